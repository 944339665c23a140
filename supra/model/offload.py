"""Models whose weights lie on the disk, or in memory beside a GPU.

Accelerate brings the weights of each module in for the time of its own `forward`. What reads them
at another time asks for them here.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils import align_module_device
from accelerate.utils.modeling import named_module_tensors
from torch import nn


@contextmanager
def weights_of(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of a module and its parts are on the device where it runs. A part loses
    them again when its own `forward` has run inside."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs and returns its outputs. Offloaded weights are on no device; a
    model of them alone, which has Accelerate's hook, takes inputs on the CPU."""
    device = next((x.device for x in model.parameters() if not x.is_meta), None)
    if device is None and not hasattr(model, "_hf_hook"):  # without data
        device = next((x.device for x in model.parameters()), None)
    return device or torch.device("cpu")


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the model's first tensor with NaN or infinity, or None. Offloaded weights are
    read one module at a time."""
    for path, module in model.named_modules():
        with align_module_device(module):
            for name, x in named_module_tensors(module, remove_non_persistent=True):
                if not x.is_meta and not x.isfinite().all():
                    return f"{path}.{name}".lstrip(".")
    return None
