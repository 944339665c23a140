"""How much worse a model gets when parts of its mixers are switched off.

A part that can go without loss is not used. In hybrids of a window and linear attention, the linear
branch is often unused (arXiv 2510.05901).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from supra.data.packing import Block
from supra.errors import UserError
from supra.evaluate.perplexity import Perplexity, perplexity
from supra.mixers import Mixer


@dataclass(frozen=True)
class Floor:
    """Perplexity of one variant of the model; ratios are relative to the intact model."""

    name: str
    perplexity: float
    ratio: float
    by_position: list[tuple[int, int, float, float]]  # (start, end, perplexity, ratio)


@dataclass(frozen=True)
class Floors:
    variants: list[Floor]  # the intact model first

    def lines(self) -> list[str]:
        intact, *others = self.variants
        heads = [f"{start:,}-{end - 1:,}" for start, end, *_ in intact.by_position]
        values = [intact.perplexity, *(x[2] for x in intact.by_position)]
        lines = [
            "floors: perplexity by tokens read before; for variants, relative to the intact model",
            f"  {'':16}{'all':>12}" + "".join(f"{head:>12}" for head in heads),
            f"  {intact.name:16}" + "".join(f"{value:12.3f}" for value in values),
        ]
        for floor in others:
            ratios = [floor.ratio, *(x[3] for x in floor.by_position)]
            lines.append(f"  {floor.name:16}" + "".join(f"{ratio:11.3f}x" for ratio in ratios))
        return lines


def find_mixers(model: nn.Module) -> list[Mixer]:
    """All mixers of a converted model. Raises UserError when it has none."""
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    if not mixers:
        raise UserError("the model has no mixers: it is not converted, run `supra convert` first")
    return mixers


def measure_floors(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    edges: Sequence[int],
    *,
    batch_size: int = 8,
    intact: Perplexity | None = None,
    teacher: PreTrainedModel | None = None,
) -> Floors:
    """Perplexity of the model: intact, with only one branch of its mixers, and without mixing.

    If some layers kept softmax attention, also with only that attention. `edges` are the edges of
    the position buckets. `intact` is the intact model's perplexity if it is known already.
    """
    mixers = find_mixers(model)

    def measure(model: PreTrainedModel) -> Perplexity:
        return perplexity(model, blocks, by_position=edges, batch_size=batch_size)

    found = {"intact": intact or measure(model)}
    if teacher is not None:
        found["teacher"] = measure(teacher)
    for branch in dict.fromkeys(name for mixer in mixers for name in mixer.branches):
        with only_branch(mixers, branch):
            found[f"{branch} only"] = measure(model)
    converted = [mixer for mixer in mixers if mixer.name != "softmax"]
    if 0 < len(converted) < len(mixers):
        with silenced(converted):
            found["attention only"] = measure(model)
    with silenced(mixers):
        found["no mixing"] = measure(model)
    return Floors([_floor(name, x, found["intact"]) for name, x in found.items()])


@contextmanager
def only_branch(mixers: Sequence[Mixer], branch: str) -> Iterator[None]:
    """Inside, mixers that have this branch compute only this branch."""
    before = [(mixer, mixer.only) for mixer in mixers if branch in mixer.branches]
    for mixer, _ in before:
        mixer.only = branch
    try:
        yield
    finally:
        for mixer, only in before:
            mixer.only = only


@contextmanager
def silenced(mixers: Sequence[Mixer]) -> Iterator[None]:
    """Inside, these mixers return zeros."""

    def silence(mixer, args, output):
        return output[0].new_zeros(output[0].shape), output[1]

    hooks = [mixer.register_forward_hook(silence) for mixer in mixers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _floor(name: str, result: Perplexity, intact: Perplexity) -> Floor:
    buckets = [
        (start, end, value, value / own)
        for (start, end, value), (_, _, own) in zip(
            result.by_position, intact.by_position, strict=True
        )
    ]
    return Floor(name, result.perplexity, result.perplexity / intact.perplexity, buckets)
