"""The convolution as torch custom ops, so that torch.compile, activation checkpointing and autograd
treat it as they do any operator of torch.

A backend is a module with `forward` and `backward`, which take and return what the ops below do, an
absent tensor being None.
"""

import torch
from torch import Tensor

from supra.kernels.backends import without_autocast
from supra.kernels.causal_conv import torch as torch_backend


@torch.library.custom_op("supra::causal_conv", mutates_args=())
def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, D] and final state [N, W - 1, D]; state: the initial one, in input.dtype."""
    with without_autocast(input.device):
        return _module(backend).forward(input, weight, bias, state, cu_seqlens, silu=silu)


@torch.library.custom_op("supra::causal_conv_backward", mutates_args=())
def backward(
    d_output: Tensor,
    d_end: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias and state; empty for absent ones."""
    with without_autocast(input.device):
        results = _module(backend).backward(
            d_output, d_end, input, weight, bias, state, cu_seqlens, silu=silu
        )
    return tuple(input.new_empty(0) if x is None else x for x in results)


@torch.library.custom_op("supra::causal_conv_step", mutates_args=("state",))
def step(input: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    """Output [B, D] for the next token [B, D]; state [B, W - 1, D] is overwritten. Triton only."""
    return _module("triton").step(input, weight, bias, state, silu)


def _module(backend: str):
    if backend == "torch":
        return torch_backend
    from supra.kernels.causal_conv import triton as triton_backend  # not everybody has triton

    return triton_backend


@forward.register_fake
def _(input, weight, bias, state, cu_seqlens, silu, backend):
    sequences = input.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    end = input.new_empty(sequences, weight.shape[1] - 1, input.shape[2])
    return input.new_empty(input.shape), end


@backward.register_fake
def _(d_output, d_end, input, weight, bias, state, *_):
    inputs = (input, weight, bias, state)
    return tuple(input.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


@step.register_fake
def _(input, weight, bias, state, silu):
    return input.new_empty(input.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_output, d_end):
    tensors = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(tensors[0])
    found = backward(d_output, d_end, *tensors, ctx.silu, ctx.backend)
    present = (None if x is None else dx for x, dx in zip(tensors[:4], found, strict=True))
    return *present, *[None] * 3


forward.register_autograd(_gradients, setup_context=_setup_context)
