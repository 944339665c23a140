"""Every operation that has Triton kernels, and the calls that launch all of its kernels.

A case is an operation with some of its options. Its calls are a generator. It yields the next call,
and is sent the result of that call, so that a backward pass gets the results of the forward pass.
The calls are to the backend's module (see kernels/README.md), on any device, including meta.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONG_CONV_MODES = 32  # as in H3 and S4D


def head_sizes(operation: str) -> tuple[int, ...]:
    """The head sizes to report on.

    The channels of a convolution are those of all heads, so one size is enough. In the nonlinear
    recurrence, every block of a state writes its own part of a gradient. With heads of 256 this
    would be 50 KB per token and head, which nobody would train.
    """
    if operation in ("causal_conv", "long_conv"):
        return (64,)
    return (32, 64) if operation == "nonlinear_gated" else (32, 64, 128, 256)


class Call(NamedTuple):
    """function(*arguments). It writes to `changed`, which are some of its arguments."""

    part: str  # "forward", "backward" or "recurrent"
    function: Callable[..., Any]
    arguments: tuple
    changed: tuple[Tensor | None, ...] = ()

    def __call__(self) -> Any:
        return self.function(*self.arguments)


Calls = Generator[Call, Any, None]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a batch, and the width of a head. A decoding step has one token per row.

    packed: the batch is one row of two sequences, with states before and after them.
    """

    batch: int
    tokens: int
    heads: int
    width: int
    device: str
    packed: bool = False

    @property
    def cu_seqlens(self) -> Tensor | None:
        bounds = [0, self.tokens // 2, self.tokens]
        return torch.tensor(bounds, dtype=torch.int32, device=self.device) if self.packed else None

    def rows(self, tokens: int) -> Tensor:
        """[B, T, H, width] in bf16."""
        batch = 1 if self.packed else self.batch
        shape = (batch, tokens, self.heads, self.width)
        return torch.ones(shape, dtype=torch.bfloat16, device=self.device)

    def log_decay(self, tokens: int) -> Tensor:
        """[B, T, H] in float32."""
        return torch.zeros_like(self.rows(tokens)[..., 0], dtype=torch.float32)

    def state(self, *widths: int) -> Tensor:
        """[N, H, *widths] in float32."""
        return torch.zeros(
            2 if self.packed else self.batch, self.heads, *widths, device=self.device
        )


def passes(
    backend: ModuleType,
    inputs: Any,
    step: Any,
    state: tuple[Tensor | None, ...],
    saved: tuple[int, ...] = (),
) -> Calls:
    """Forward, backward, and recurrent where rows are not packed: `step`, which writes to `state`.

    saved: places of the results that the backward pass takes.
    """
    output, *rest = results = yield Call("forward", backend.forward, (inputs,))
    packed = inputs.cu_seqlens is not None
    d_end = rest[: len(state)] if packed else [None] * len(state)
    arguments = (inputs, torch.ones_like(output), *d_end, *(results[i] for i in saved))
    yield Call("backward", backend.backward, arguments)
    if not packed:
        yield Call("recurrent", backend.recurrent, (step,), state)


def linear_attention(sizes: Sizes, *, decay: bool = False, normalized: bool = False) -> Calls:
    from supra.kernels.linear_attention import triton as backend
    from supra.kernels.linear_attention.inputs import Inputs

    width, options = sizes.width, (normalized, 1.0, 1e-6, 64, "triton")
    state = (sizes.state(width, width), sizes.state(width) if normalized else None)

    def inputs(tokens: int, *state_and_bounds: Tensor | None) -> Inputs:
        rows = (sizes.rows(tokens) for _ in range(3))
        log_decay = sizes.log_decay(tokens) if decay else None
        return Inputs(*rows, log_decay, *state_and_bounds, *options)

    whole = inputs(sizes.tokens, *(state if sizes.packed else (None, None)), sizes.cu_seqlens)
    return passes(backend, whole, inputs(1, *state, None), state, saved=(0, 3))


def gated_linear_attention(sizes: Sizes, *, bonus: bool = False) -> Calls:
    from supra.kernels.gated_linear_attention import triton as backend
    from supra.kernels.gated_linear_attention.inputs import Inputs

    state = sizes.state(sizes.width, sizes.width)

    def inputs(tokens: int, *state_and_bounds: Tensor | None) -> Inputs:
        *rows, log_decay = (sizes.rows(tokens) for _ in range(4))
        weights = log_decay[0, 0].clone() if bonus else None
        return Inputs(*rows, log_decay.float(), weights, *state_and_bounds, 1.0, 64, "triton")

    whole = inputs(sizes.tokens, state if sizes.packed else None, sizes.cu_seqlens)
    return passes(backend, whole, inputs(1, state, None), (state,))


def gated_delta_rule(sizes: Sizes, *, decay: bool = False) -> Calls:
    from supra.kernels.delta import Inputs
    from supra.kernels.gated_delta_rule import triton as backend

    state = sizes.state(sizes.width, sizes.width)

    def inputs(tokens: int, *state_and_bounds: Tensor | None) -> Inputs:
        query, key, value = (sizes.rows(tokens) for _ in range(3))
        log_decay, beta = sizes.log_decay(tokens) if decay else None, query[..., 0].clone()
        return Inputs(query, key, value, beta, log_decay, *state_and_bounds, 1.0, 64, "triton")

    whole = inputs(sizes.tokens, state if sizes.packed else None, sizes.cu_seqlens)
    return passes(backend, whole, inputs(1, state, None), (state,))


def kda(sizes: Sizes) -> Calls:
    from supra.kernels.delta import Inputs
    from supra.kernels.kda import triton as backend

    state = sizes.state(sizes.width, sizes.width)

    def inputs(tokens: int, *state_and_bounds: Tensor | None) -> Inputs:
        *rows, log_decay = (sizes.rows(tokens) for _ in range(4))
        beta, log_decay = log_decay[..., 0].clone(), log_decay.float()
        return Inputs(*rows, beta, log_decay, *state_and_bounds, 1.0, 64, "triton")

    whole = inputs(sizes.tokens, state if sizes.packed else None, sizes.cu_seqlens)
    return passes(backend, whole, inputs(1, state, None), (state,))


def causal_conv(sizes: Sizes, *, bias: bool = False, silu: bool = False) -> Calls:
    """A convolution over 4 tokens; the channels are those of all heads."""
    from supra.kernels.causal_conv import triton as backend
    from supra.kernels.causal_conv.inputs import Inputs

    input = sizes.rows(sizes.tokens).flatten(2)
    channels = input.shape[2]
    weights = (input.new_ones(channels, 4), input.new_ones(channels) if bias else None)
    state = input.new_zeros(2 if sizes.packed else sizes.batch, 3, channels)
    before = state if sizes.packed else None
    whole = Inputs(input, *weights, before, sizes.cu_seqlens, silu, "triton")
    step = Inputs(sizes.rows(1).flatten(2), *weights, state, None, silu, "triton")
    return passes(backend, whole, step, (state,))


def long_conv(sizes: Sizes, *, width: int = 1, skip: bool = False) -> Calls:
    """H3 with heads of `width` channels; the channels are those of all heads."""
    from supra.kernels.long_conv import triton as backend
    from supra.kernels.long_conv.inputs import Inputs

    heads = sizes.heads * sizes.width // width
    log_decay = torch.zeros(heads, LONG_CONV_MODES, device=sizes.device)
    weight = log_decay[..., None].repeat(1, 1, 2)
    model = (log_decay, log_decay.clone(), weight, log_decay[:, 0].clone() if skip else None)
    sequences = 2 if sizes.packed else sizes.batch
    state = torch.zeros(sequences, *log_decay.shape, 2, width, width, device=sizes.device)

    def inputs(tokens: int, *state_and_bounds: Tensor | None) -> Inputs:
        rows = (sizes.rows(tokens).flatten(2).unflatten(2, (-1, width)) for _ in range(3))
        return Inputs(*rows, *model, *state_and_bounds, 64, "triton")

    whole = inputs(sizes.tokens, state if sizes.packed else None, sizes.cu_seqlens)
    return passes(backend, whole, inputs(1, state, None), (state,))


def nonlinear_gated(sizes: Sizes) -> Calls:
    """Two sweeps, whatever residual they leave, because the bytes moved do not depend on it."""
    from supra.kernels.nonlinear_gated import triton as backend
    from supra.kernels.nonlinear_gated.inputs import Inputs

    state, options = sizes.state(sizes.width, sizes.width), (1.0, 2, math.inf, 16, True, "triton")
    weight = torch.zeros_like(state[0])

    def inputs(tokens: int, *state_and_bounds: Tensor | None) -> Inputs:
        rows = (sizes.rows(tokens) for _ in range(3))
        return Inputs(*rows, sizes.log_decay(tokens), weight, *state_and_bounds, *options)

    whole = inputs(sizes.tokens, state if sizes.packed else None, sizes.cu_seqlens)
    return passes(backend, whole, inputs(1, state, None), (state,), saved=(2,))


class Case(NamedTuple):
    calls: Callable[[Sizes], Calls]
    packed: bool = False

    def with_sizes(self, *sizes: Any) -> Calls:
        return self.calls(Sizes(*sizes, packed=self.packed))


# operation -> case; each case uses more options of the kernels than the previous one
OPERATIONS: dict[str, dict[str, Case]] = {
    "linear_attention": {
        "plain": Case(linear_attention),
        "decay, sum": Case(partial(linear_attention, decay=True, normalized=True)),
        "packed": Case(partial(linear_attention, decay=True, normalized=True), packed=True),
    },
    "gated_linear_attention": {
        "plain": Case(gated_linear_attention),
        "bonus": Case(partial(gated_linear_attention, bonus=True)),
        "packed": Case(gated_linear_attention, packed=True),
    },
    "gated_delta_rule": {
        "plain": Case(gated_delta_rule),
        "decay": Case(partial(gated_delta_rule, decay=True)),
        "packed": Case(partial(gated_delta_rule, decay=True), packed=True),
    },
    "kda": {
        "plain": Case(kda),
        "packed": Case(kda, packed=True),
    },
    "causal_conv": {
        "plain": Case(causal_conv),
        "bias, silu": Case(partial(causal_conv, bias=True, silu=True)),
        "packed": Case(partial(causal_conv, bias=True, silu=True), packed=True),
    },
    "long_conv": {
        "width 1": Case(long_conv),
        "width 8": Case(partial(long_conv, width=8, skip=True)),
        "packed": Case(partial(long_conv, skip=True), packed=True),
    },
    "nonlinear_gated": {
        "plain": Case(nonlinear_gated),
        "packed": Case(nonlinear_gated, packed=True),
    },
}


def run_calls(calls: Calls, run: Callable[[Call], Any]) -> None:
    """Run every call with `run`, and send its result back to the generator."""
    result = None
    while True:
        try:
            call = calls.send(result)
        except StopIteration:
            return
        result = run(call)
