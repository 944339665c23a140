"""Work that all processes of a run do together."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from supra.errors import UserError

T = TypeVar("T")


def on_main(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Call `act` in the main process only. Every process returns its result or raises its error."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except (UserError, OSError) as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


def autocast(device: torch.device, precision: str, keeps_casts: bool = True) -> torch.autocast:
    """The context for forward passes in the run's precision.

    It replaces accelerate's, which turns all logits into float32 at once. keeps_casts: keep those
    of trained weights until the context ends. With FSDP these would be casts of the whole model.
    """
    enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled, cache_enabled=keeps_casts)
