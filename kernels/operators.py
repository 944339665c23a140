"""Operations as custom operators of torch, and how they run by the backend that is asked for.

torch.compile, activation checkpointing and autograd treat a custom operator as they do any operator
of torch. An operation describes its arguments once, in a NamedTuple `Inputs`: the tensors that get
gradients, then cu_seqlens, then the options. Its backends are modules with

    forward(inputs) -> results            output, final state, what the backward pass needs
    backward(inputs, *d_results, *saved)  gradients of the tensors before cu_seqlens
    recurrent(inputs)                     output token by token; Triton's overwrites the state

in which an absent tensor is None. Inputs.empty_results() returns empty tensors of the shapes and
dtypes of the results.
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import Parameter, Signature
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import without_autocast


class Operator:
    """The custom operators of one operation.

    forward(*inputs) -> results, an absent one being a tensor of shape [0].
    backward(*d_results, *tensors, *saved, *options) -> gradients, absent ones of shape [0].
    step(*inputs) -> output of Triton's recurrence, which overwrites the state. The recurrence of
        the torch backend needs no custom operator: it is made of torch's own.
    """

    def __init__(
        self,
        name: str,
        inputs: type,
        torch_backend: ModuleType,
        reference: ModuleType,
        *,
        state: type[tuple] | None = None,
        results: tuple[str, ...] = ("output", "end"),
        saved: tuple[str, ...] = (),
    ):
        """triton.py beside torch_backend has the kernels.

        state: NamedTuple of the states among the fields of inputs; None for one called `state`. The
        results after the output are the final state. saved: the results that the backward pass
        needs.
        """
        self.inputs, self.torch_backend, self.reference = inputs, torch_backend, reference
        self.fields = ("state",) if state is None else state._fields
        self.state = state or (lambda end: end)
        self.saved = [results.index(name) for name in saved]
        self.differentiable = 1 + len(self.fields)
        types = get_type_hints(inputs)
        self.tensors = sum(x in (Tensor, Tensor | None) for x in types.values())
        fields = list(types.items())
        tensors, options = fields[: self.tensors], fields[self.tensors :]
        d_end = [(f"d_{name}", Tensor | None) for name in results[1 : self.differentiable]]
        kept = [(name, Tensor) for name in saved]
        backward = [("d_output", Tensor), *d_end, *tensors, *kept, *options]

        self.forward = _custom_op(name, self._forward, fields, len(results))
        self.forward.register_fake(lambda *x: _returned(inputs(*x).empty_results(), x))
        self.forward.register_autograd(self._gradients, setup_context=self._setup_context)
        self.backward = _custom_op(f"{name}_backward", self._backward, backward, self.tensors - 1)
        self.backward.register_fake(self._empty_gradients)
        self.step = _custom_op(f"{name}_step", self._step, fields, 1, mutates=self.fields)
        self.step.register_fake(lambda *x: inputs(*x).empty_results()[0])

    def run(self, inputs: Any, return_state: bool) -> tuple[Tensor, Any]:
        """Output and final state, or None, of whole sequences, by inputs.backend."""
        output, end = self._whole(inputs)
        return output, self.state(*end) if return_state else None

    def run_by_token(
        self, inputs: Any, name: str, state: Any, return_state: bool, in_place: bool
    ) -> tuple[Tensor, Any]:
        """The same token by token. in_place: write over the state that the caller gave as name."""
        if in_place:
            checks.check_in_place(inputs, self.fields, name, state)
        output, end = self._by_token(inputs, in_place)
        return output, self.state(*end) if return_state else None

    def _whole(self, inputs: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        if inputs.backend == "reference":
            with without_autocast(_first(inputs).device):
                found = self.reference.recurrence(inputs)
            pairs = zip(found, inputs.empty_results(), strict=False)
            output, *end = (x if x is None else x.to(like.dtype) for x, like in pairs)
        else:
            output, *end = map(_given, self.forward(*inputs))
        return output, tuple(end[: len(self.fields)])

    def _by_token(self, inputs: Any, in_place: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        if inputs.backend == "torch":
            with without_autocast(_first(inputs).device):
                output, *end = self.torch_backend.recurrent(inputs, in_place)
            return output, tuple(end)
        state = tuple(getattr(inputs, name) for name in self.fields)
        if inputs.backend == "reference" or checks.needs_gradient(*inputs):
            output, end = self._whole(inputs)
            if in_place:
                end = tuple(x if x is None else x.copy_(y) for x, y in zip(state, end, strict=True))
            return output, end
        if not in_place:
            likes = inputs.empty_results()[1 : self.differentiable]
            state = tuple(map(checks.copy_or_zeros, state, likes))
        changed = dict(zip(self.fields, state, strict=True))
        given = (changed.get(name, x) for name, x in zip(inputs._fields, inputs, strict=True))
        return self.step(*given), state

    def _backend(self, inputs: Any) -> ModuleType:
        if inputs.backend == "torch":
            return self.torch_backend
        return import_module(f"{self.torch_backend.__package__}.triton")  # not everybody has triton

    def _forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        inputs = self.inputs(*arguments)
        with without_autocast(_first(arguments).device):
            return _returned(self._backend(inputs).forward(inputs), arguments)

    def _split(self, arguments: tuple) -> tuple[tuple, tuple, tuple]:
        """Of the arguments of `backward`: d_results, the fields of inputs, saved results."""
        middle = self.differentiable + self.tensors
        end = middle + len(self.saved)
        fields = arguments[self.differentiable : middle] + arguments[end:]
        return arguments[: self.differentiable], fields, arguments[middle:end]

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        d_results, fields, saved = self._split(arguments)
        inputs = self.inputs(*fields)
        with without_autocast(_first(fields).device):
            found = self._backend(inputs).backward(inputs, *d_results, *saved)
        return _returned(found, fields)

    def _empty_gradients(self, *arguments: Any) -> tuple[Tensor, ...]:
        _, fields, _ = self._split(arguments)
        found = (x if x is None else x.new_empty(x.shape) for x in fields[: self.tensors - 1])
        return _returned(found, fields)

    def _step(self, *arguments: Any) -> Tensor:
        inputs = self.inputs(*arguments)
        return self._backend(inputs).recurrent(inputs)

    def _setup_context(self, ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: self.tensors], *(output[i] for i in self.saved))
        ctx.options = inputs[self.tensors :]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[self.differentiable :])

    def _gradients(self, ctx: Any, *d_results: Tensor | None) -> tuple[Tensor | None, ...]:
        d_output, *d_end = d_results[: self.differentiable]
        kept = ctx.saved_tensors  # once: checkpointing makes them anew each time
        if d_output is None:
            inputs = self.inputs(*kept[: self.tensors], *ctx.options)
            d_output = torch.zeros_like(inputs.empty_results()[0])
        found = self.backward(d_output, *map(_given, d_end), *kept, *ctx.options)
        present = (None if x is None else dx for x, dx in zip(kept, found, strict=False))
        return *present, *[None] * (1 + len(ctx.options))


def empty_head_results(inputs: Any, state_heads: int | None = None) -> tuple[Tensor, Tensor]:
    """Empty output [B, T, Hq, V] and final state [N, state_heads, K, V].

    inputs: has query, key, value and cu_seqlens. state_heads: None for as many as keys have.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    heads = key.shape[2] if state_heads is None else state_heads
    count, dtype = checks.sequences(query, inputs.cu_seqlens), checks.state_dtype(query, key, value)
    state = query.new_empty(count, heads, key.shape[3], value.shape[3], dtype=dtype)
    return value.new_empty(*query.shape[:3], value.shape[3]), state


def _custom_op(
    name: str,
    function: Callable,
    arguments: Iterable[tuple[str, Any]],
    results: int,
    mutates: tuple[str, ...] = (),
) -> Any:
    """`function` as a custom operator; torch reads its schema off the signature that it gets."""

    def call(*given: Any) -> Any:
        return function(*given)

    kind = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter(name, kind, annotation=type_) for name, type_ in arguments]
    returned = Tensor if results == 1 else tuple[(Tensor,) * results]
    call.__signature__ = Signature(parameters, return_annotation=returned)
    return torch.library.custom_op(f"supra::{name}", call, mutates_args=mutates)


def _first(arguments: Iterable[Any]) -> Tensor:
    return next(x for x in arguments if x is not None)


def _returned(results: Iterable[Tensor | None], arguments: Iterable[Any]) -> tuple[Tensor, ...]:
    """Results as an operator must return them: contiguous, and none of them None."""
    empty = _first(arguments).new_empty
    return tuple(empty(0) if x is None else x.contiguous() for x in results)


def _given(x: Tensor | None) -> Tensor | None:
    """None for the tensor of shape [0] that stands for an absent result."""
    return None if x is None or (x.dim() == 1 and x.shape[0] == 0) else x
