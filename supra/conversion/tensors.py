"""The tensors of the converted model: inherited ones, and starting values of the new ones."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from supra.checkpoint.conversion_report import TensorFate
from supra.conversion.plan import Plan
from supra.errors import UserError
from supra.mixers import float32_at_least
from supra.model.attention import attention_modules


def converted_tensors(plan: Plan, seed: int, bar: str | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the converted model, one at a time.

    bar: the label of the progress bar; None shows no bar.
    """
    inherited = [x for x in plan.fates if x.fate in ("copied", "transformed")]
    shown = tqdm(inherited, desc=bar, unit="tensor", disable=bar is None)
    for fate, after in zip(shown, [*inherited[1:], None], strict=True):
        tensor = plan.reader.load(fate.name)
        if after is not None:
            plan.reader.read_ahead(after.name)
        yield fate.name, _finite(fate, tensor)
    yield from new_tensors(plan.student, seed)


def _finite(fate: TensorFate, tensor: Tensor) -> Tensor:
    """The tensor in its new dtype. Raises UserError if it holds NaN or infinity."""
    cast = tensor.to(getattr(torch, fate.dtype))
    if not _is_finite(cast):
        if _is_finite(tensor):
            raise UserError(
                f"tensor {fate.name} overflows in dtype {fate.dtype}: use bfloat16 or float32"
            )
        raise UserError(
            f"tensor {fate.name} holds NaN or infinity, so the model cannot predict anything: "
            "download its weights again"
        )
    return cast


def _is_finite(tensor: Tensor) -> bool:
    """By minimum and maximum, which NaN passes through: 12 times as fast as isfinite() in bf16."""
    return tensor.numel() == 0 or all(x.isfinite() for x in tensor.aminmax())


def load_converted(plan: Plan, seed: int, progress: bool) -> PreTrainedModel:
    """The converted model in memory, the same as if it were loaded from its folder."""
    return type(plan.student).from_pretrained(
        None,
        config=plan.config,
        dtype=plan.config.dtype,
        state_dict=dict(converted_tensors(plan, seed, "load" if progress else None)),
    )


def new_tensors(student: PreTrainedModel, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The starting values of every mixer, named as in the checkpoint."""
    names = {module: name for name, module in student.named_modules()}
    for attention in attention_modules(student):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + attention.layer_idx)
            mixer = copy.deepcopy(attention.mixer).float().to_empty(device="cpu")
            with float32_at_least():
                mixer.reset_parameters()
        path = f"{names[attention]}.mixer"
        yield from ((f"{path}.{name}", x) for name, x in mixer.state_dict().items())
