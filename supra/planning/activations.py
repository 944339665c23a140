"""What autograd keeps of a forward pass, counted on tensors that have shapes and no memory.

The student's own modules run under torch's fake tensors, once with one row and once with two, and
every tensor that they save for the backward pass is counted. What does not grow with the rows are
copies of weights in the dtype of the computation, and constants; the rest is per row. The
operations of `supra.kernels` save the same tensors in all backends.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from supra.errors import UserError, foreign_errors
from supra.losses.chunked import language_model
from supra.model.attention import attention_modules, blocks_of
from supra.planning.parameters import converted

# the parts of a block; OUTSIDE is what comes before and after the blocks
NORMS, PROJECTIONS, MIXER, FEED_FORWARD = "norms", "projections", "mixer", "feed-forward"
MATRIX, OUTSIDE = "attention matrix", "outside"


@dataclass(frozen=True)
class Kept:
    """Bytes that are kept for the backward pass.

    layers: of each block, by part, for one row. layer_input: what gradient checkpointing keeps of a
    block, for one row. outside: beside the blocks, for one row. fixed: whatever the rows are.
    """

    layers: list[dict[str, int]]
    layer_input: int
    outside: int
    fixed: int

    @property
    def all_layers(self) -> int:
        return sum(sum(parts.values()) for parts in self.layers)

    @property
    def largest_layer(self) -> int:
        return max(sum(parts.values()) for parts in self.layers)

    @property
    def largest_part(self) -> int:
        return max(max(parts.values()) for parts in self.layers)


def count_end_to_end(model: nn.Module, length: int, dtype: torch.dtype) -> Kept:
    """What a pass of the whole student keeps of rows of `length` tokens.

    model: on the meta device, with the gradients that the stage needs; afterwards it is of no
        further use. dtype: that of the computation, bfloat16 or float32.
    """
    student = language_model(model)
    with _faked(model):
        one, two = (_whole_pass(student, rows, length, dtype) for rows in (1, 2))
    parts = (NORMS, PROJECTIONS, MIXER, FEED_FORWARD)
    numbers = range(len(blocks_of(student)))
    return Kept(
        layers=[{x: two[n, x] - one[n, x] for x in parts} for n in numbers],
        layer_input=two["layer_input"] - one["layer_input"],
        outside=two[OUTSIDE] - one[OUTSIDE],
        fixed=sum(2 * one[key] - two[key] for key in one if key != "layer_input"),
    )


def count_layerwise(model: nn.Module, length: int, dtype: torch.dtype, matrices: bool) -> Kept:
    """What each attention module keeps when it is trained alone. Arguments as above.

    matrices: whether it learns the teacher's attention matrix, as in the stage orient.
    """
    student = language_model(model)
    with _faked(model):
        one, two = (_alone(student, rows, length, dtype, matrices) for rows in (1, 2))
    pairs = list(zip(one, two, strict=True))
    parts = (PROJECTIONS, MIXER, MATRIX) if matrices else (PROJECTIONS, MIXER)
    return Kept(
        layers=[{x: b[x] - a[x] for x in parts} for a, b in pairs],
        layer_input=0,
        outside=0,
        fixed=max(2 * a.total() - b.total() for a, b in pairs),
    )


@contextmanager
def _faked(model: nn.Module) -> Iterator[None]:
    """Inside, the model has fake tensors of a CPU, because the meta device has no autocast."""
    check_countable(model)
    model.eval()  # dropout of windows asks for numbers, which fake tensors do not have
    with foreign_errors("activations cannot be counted"), FakeTensorMode():
        model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cpu"))
        yield


def check_countable(model: nn.Module) -> None:
    """Raise UserError for a mixture of experts: a router decides what the experts compute."""
    if any(type(module).__name__.endswith("Experts") for module in model.modules()):
        raise UserError(
            "a mixture of experts cannot be planned: how many tokens an expert gets is only known "
            "when the model runs"
        )


def _whole_pass(student: PreTrainedModel, rows: int, length: int, dtype: torch.dtype) -> Counter:
    counter = _Counter(student, OUTSIDE)
    attentions = {id(x) for x in attention_modules(student)}
    for number, layer in enumerate(blocks_of(student)):
        counter.handles.append(layer.register_forward_pre_hook(counter.see_input))
        counter.watch(layer, (number, NORMS))
        for child in layer.children():
            if id(child) in attentions:
                counter.watch(child, (number, PROJECTIONS))
                counter.watch_mixer(child, (number, MIXER))
            elif any(parameter.ndim > 1 for parameter in child.parameters()):
                counter.watch(child, (number, FEED_FORWARD))
    with counter.counting(), _autocast(dtype):
        _run(student, rows, length)
    counter.remove()
    return counter.bytes


def _alone(
    student: PreTrainedModel, rows: int, length: int, dtype: torch.dtype, matrices: bool
) -> list[Counter]:
    """A count for each attention module, on the inputs that it gets in a pass without gradients."""
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    handles = [
        module.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
        for module in converted(student)
    ]
    with torch.no_grad(), _autocast(dtype):
        _run(student, rows, length)
    for handle in handles:
        handle.remove()
    return [_count_call(student, dtype, matrices, *call) for call in calls]


def _count_call(
    student: PreTrainedModel,
    dtype: torch.dtype,
    matrices: bool,
    attention: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Counter:
    counter, calls = _Counter(student, PROJECTIONS), []
    counter.watch_mixer(attention, MIXER)
    see = attention.mixer.register_forward_pre_hook(lambda mixer, given: calls.append(given))
    counter.handles.append(see)
    with counter.counting(), _autocast(dtype):
        attention(*args, **kwargs)
        if matrices:
            counter.places.append(MATRIX)
            attention.mixer.mixing_matrix(*calls[0])
    counter.remove()
    return counter.bytes


def _run(student: PreTrainedModel, rows: int, length: int) -> None:
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    student.base_model(input_ids=tokens, use_cache=False)


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


class _Counter:
    """Adds up the bytes of saved tensors under the innermost part that is running. A storage counts
    once, however many operations save it, and those of the student's own tensors do not count."""

    def __init__(self, student: nn.Module, place: Any):
        tensors = (*student.parameters(), *student.buffers())
        self.known = {x.untyped_storage()._cdata: x for x in tensors}
        self.places, self.bytes = [place], Counter()
        self.handles: list[Any] = []

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._save, lambda x: x)

    def _save(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = x  # kept alive, so that no other storage gets its number
            self.bytes[self.places[-1]] += storage.nbytes()
        return x

    def watch(self, module: nn.Module, place: Any) -> None:
        """While the module runs, count under this part."""
        enter = module.register_forward_pre_hook(lambda *_: self.places.append(place))
        leave = module.register_forward_hook(self._leave)
        self.handles += [enter, leave]

    def watch_mixer(self, attention: nn.Module, place: Any) -> None:
        """The same for an attention module's mixer, if it has one."""
        if hasattr(attention, "mixer"):
            self.watch(attention.mixer, place)

    def see_input(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A forward pre-hook of a block: the size of its input."""
        self.bytes["layer_input"] = args[0].nbytes

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.places.pop()  # without a result: one would replace the output

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for handle in self.handles:
            handle.remove()
