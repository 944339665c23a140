"""How far each head looks back: from its weights on the values of earlier tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from supra.errors import UserError
from supra.evaluate.ablate.floors import find_mixers
from supra.mixers import Mixer
from supra.model.attention import attention_modules
from supra.model.offload import device_of, weights_of

TOKENS = 512  # per row
ROWS = 4
NEAR = 64  # tokens


@dataclass(frozen=True)
class LayerLookBack:
    """Each list has one value per head. Shares are shares of the sum of |weight|.

    The first token's column is left out, because many heads put their weight on it when they have
    nothing to contribute (arXiv 2309.17453).
    """

    layer: int
    mixer: str
    distance: list[float]  # mean distance in tokens, weighted by |weight|
    current: list[float]  # share on the token itself
    near: list[float]  # share on earlier tokens, fewer than NEAR tokens back
    far: list[float]  # share on tokens NEAR or more tokens back


@dataclass(frozen=True)
class LookBack:
    tokens: int  # tokens per row, which is the limit of every distance
    model: list[LayerLookBack]
    teacher: list[LayerLookBack] | None

    def lines(self) -> list[str]:
        lines = [
            f"look-back of heads in rows of {self.tokens} tokens, as min / median / max: "
            "mean distance in tokens,",
            f"  share of weight on the token itself, nearer than {NEAR} tokens, and beyond",
        ]
        for name, layers in (("model", self.model), ("teacher", self.teacher or [])):
            if layers:
                lines.append(f"  {name:7}{'distance':>23}{'itself':>20}{'near':>20}{'beyond':>20}")
            lines += [_line(layer) for layer in layers]
        return lines


def cut_rows(
    documents: Sequence[list[int]], tokens: int = TOKENS, rows: int = ROWS
) -> list[list[int]]:
    """Rows of equal length, each from one document, spread over the whole text.

    The length is `tokens`, or that of the longest document if it is shorter.
    """
    tokens = min(tokens, max(map(len, documents), default=0))
    if tokens < 2:
        raise UserError("the text has no document of two or more tokens: give a longer text")
    pieces = [
        document[start : start + tokens]
        for document in documents
        for start in range(0, len(document) - tokens + 1, tokens)
    ]
    return pieces[:: max(1, len(pieces) // rows)][:rows]


@torch.no_grad()
def measure_look_back(
    model: PreTrainedModel, rows: Sequence[list[int]], teacher: PreTrainedModel | None = None
) -> LookBack:
    """Look-back of every mixer, and of the teacher's softmax attention, on rows of equal length."""
    find_mixers(model)
    mixers = {attention.layer_idx: attention.mixer for attention in attention_modules(model)}
    sums: dict[int, Tensor] = {}

    def of_mixer(layer: int, mixer: Mixer, args: tuple[Any, ...]) -> None:
        with weights_of(mixer):
            _add(sums, layer, mixer.mixing_matrix(args[0]))

    hooks = [
        mixer.register_forward_pre_hook(partial(of_mixer, layer)) for layer, mixer in mixers.items()
    ]
    try:
        _read(model, rows)
    finally:
        for hook in hooks:
            hook.remove()
    own = [_summary(layer, mixers[layer].name, sums[layer]) for layer in sorted(sums)]
    of_teacher = None if teacher is None else _teacher_look_back(teacher, rows)
    return LookBack(len(rows[0]), own, of_teacher)


def _teacher_look_back(teacher: PreTrainedModel, rows: Sequence[list[int]]) -> list[LayerLookBack]:
    sums: dict[int, Tensor] = {}

    def of_attention(attention: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> None:
        _add(sums, attention.layer_idx, output[1])

    hooks = [x.register_forward_hook(of_attention) for x in attention_modules(teacher)]
    try:
        with _eager(teacher):
            _read(teacher, rows)
    finally:
        for hook in hooks:
            hook.remove()
    return [_summary(layer, "softmax", sums[layer]) for layer in sorted(sums)]


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model uses the implementation of attention that returns its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _read(model: PreTrainedModel, rows: Sequence[list[int]]) -> None:
    """Read the rows one at a time, because a layer's matrices have heads × tokens² elements."""
    for row in rows:
        ids = torch.tensor([row], device=device_of(model))
        getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False)


def _add(sums: dict[int, Tensor], layer: int, matrix: Tensor) -> None:
    sums[layer] = sums.get(layer, 0) + weight_by_distance(matrix)


def weight_by_distance(matrix: Tensor) -> Tensor:
    """The sum of |weight| of a mixing matrix [B, H, T, T] at each distance, float64 [H, T]."""
    weight = matrix.abs().double().sum(0)
    weight[..., 0] = 0
    at = torch.arange(weight.shape[-1], device=weight.device)
    distance = (at[:, None] - at).clamp(min=0)
    sums = weight.new_zeros(weight.shape[:2])
    return sums.scatter_add_(1, distance.expand_as(weight).flatten(1), weight.tril().flatten(1))


def _summary(layer: int, mixer: str, sums: Tensor) -> LayerLookBack:
    share = sums / sums.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    distance = torch.arange(share.shape[1], device=share.device, dtype=torch.float64)
    parts = share[:, 0], share[:, 1:NEAR].sum(1), share[:, NEAR:].sum(1)
    return LayerLookBack(layer, mixer, *(x.tolist() for x in (share @ distance, *parts)))


def _line(layer: LayerLookBack) -> str:
    def spread(values: list[float], digits: int) -> str:
        middle = torch.tensor(values).median().item()
        return " / ".join(f"{x:.{digits}f}" for x in (min(values), middle, max(values)))

    shares = "".join(f"{spread(x, 2):>20}" for x in (layer.current, layer.near, layer.far))
    return f"  {layer.layer:7d}{spread(layer.distance, 1):>23}{shares}  {layer.mixer}"
