"""How far each attention layer of a trained model is from the teacher's layer.

Both layers read the teacher's inputs, so the errors of lower layers do not count.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from supra.data.packing import Block, collate
from supra.errors import UserError
from supra.evaluate.ablate.floors import find_mixers
from supra.model.attention import attention_modules
from supra.model.offload import device_of
from supra.model.rows import document_boundaries


@dataclass(frozen=True)
class LayerError:
    """|y - y*|² / |y*|² for the attention module's output; an output of zeros has error 1."""

    layer: int
    mixer: str
    error: float


@dataclass(frozen=True)
class LayerErrors:
    layers: list[LayerError]

    def lines(self) -> list[str]:
        mean = sum(x.error for x in self.layers) / len(self.layers)
        return [
            f"layers: relative squared error to the teacher's attention; mean {mean:.4f}",
            *(f"  {x.layer:4d} {x.error:10.4f}  {x.mixer}" for x in self.layers),
        ]


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise UserError when the two models differ in shape, or when the teacher is converted too."""
    own, other = (x.config.get_text_config() for x in (model, teacher))
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(own, name) != getattr(other, name):
            raise UserError(
                f"the teacher has {name} {getattr(other, name)} and the model has "
                f"{getattr(own, name)}: give the checkpoint that the model was converted from"
            )
    if teacher.config.model_type == "supra" or hasattr(other, "supra"):
        raise UserError("the teacher is converted too: give the original checkpoint")


@torch.no_grad()
def measure_layer_errors(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: Sequence[Block],
    *,
    batch_size: int = 8,
) -> LayerErrors:
    """The error of every converted attention module, over all tokens of packed blocks."""
    find_mixers(model)
    family, other = model.config.base_model_type, teacher.config.model_type
    if family != other:
        raise UserError(
            f"the teacher's family is {other} and the model's is {family}, whose layers take other "
            "inputs: give the checkpoint that the model was converted from"
        )
    pairs = sorted(
        zip(attention_modules(model), attention_modules(teacher), strict=True),
        key=lambda pair: pair[0].layer_idx,
    )
    sums = [torch.zeros(2, dtype=torch.float64) for _ in pairs]  # |y - y*|², |y*|²
    for start in range(0, len(blocks), batch_size):
        batch = collate(blocks[start : start + batch_size])
        inputs = {x: batch[x].to(device_of(teacher)) for x in ("input_ids", "position_ids")}
        mask = document_boundaries(inputs["position_ids"], len(batch["input_ids"]))
        with ExitStack() as hooks:
            for (own, other), total in zip(pairs, sums, strict=True):
                hook = partial(_compare, own, mask, total)
                handle = other.register_forward_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            getattr(teacher, teacher.base_model_prefix)(**inputs, use_cache=False)
    return LayerErrors(
        [
            LayerError(own.layer_idx, own.mixer.name, (total[0] / total[1]).item())
            for (own, _), total in zip(pairs, sums, strict=True)
        ]
    )


def _compare(
    own: nn.Module,
    mask: Tensor | None,
    total: Tensor,
    teacher: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    """A forward hook of the teacher's attention module: adds this layer's squared error to `total`.

    The teacher's mask is [T, T], for softmax attention; `mask` has the document boundaries that a
    mixer takes.
    """
    given = dict(zip(own.forward_names, args, strict=False)) | kwargs
    found, *_ = own(**given | {"attention_mask": mask})
    found, target = found.double(), output[0].double()
    total += torch.stack([(found - target).square().sum(), target.square().sum()]).cpu()
