"""Both convolutions as torch custom ops, one for each direction, so that torch.compile, activation
checkpointing and autograd treat them as they do any operator of torch.

A backend of the chunked form is a module with `chunk_forward` and `chunk_backward`, which take and
return what the ops below do, an absent tensor being None. The model's log_decay, frequency, weight
and skip and the state are of one dtype, which is computed in.
"""

import torch
from torch import Tensor

from supra.kernels.backends import without_autocast
from supra.kernels.checks import sequences
from supra.kernels.long_conv import fft
from supra.kernels.long_conv import torch as torch_backend


@torch.library.custom_op("supra::ssm_conv", mutates_args=())
def forward(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and final state [N, H, M, 2, K, V]; state is the initial one or None."""
    with without_autocast(value.device):
        output, end = _module(backend).chunk_forward(
            query, key, value, log_decay, frequency, weight, skip, state, cu_seqlens,
            chunk_size=chunk_size,
        )  # fmt: skip
    return output.contiguous(), end


@torch.library.custom_op("supra::ssm_conv_backward", mutates_args=())
def backward(
    d_output: Tensor,
    d_end: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, the model's four and state; empty for absent ones."""
    with without_autocast(value.device):
        results = _module(backend).chunk_backward(
            d_output, d_end, query, key, value, log_decay, frequency, weight, skip, state,
            cu_seqlens, chunk_size=chunk_size,
        )  # fmt: skip
    return tuple(value.new_empty(0) if x is None else x.contiguous() for x in results)


@torch.library.custom_op("supra::ssm_conv_step", mutates_args=("state",))
def step(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    state: Tensor,
) -> Tensor:
    """Output of the recurrence token by token in Triton; the state is updated in place.

    torch's recurrent form needs no op of its own: it is made of torch's.
    """
    return _module("triton").recurrent(query, key, value, log_decay, frequency, weight, skip, state)


def _module(backend: str):
    if backend == "torch":
        return torch_backend
    from supra.kernels.long_conv import triton  # not everybody has triton

    return triton


@forward.register_fake
def _(query, key, value, log_decay, frequency, weight, skip, state, cu_seqlens, *_):
    key_width = 1 if key is None else key.shape[3]
    shape = (*log_decay.shape, 2, key_width, value.shape[3])
    return value.new_empty(value.shape), log_decay.new_empty(sequences(value, cu_seqlens), *shape)


@backward.register_fake
def _(d_output, d_end, query, key, value, log_decay, frequency, weight, skip, state, *_):
    inputs = (query, key, value, log_decay, frequency, weight, skip, state)
    return tuple(value.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


@step.register_fake
def _(query, key, value, *_):
    return value.new_empty(value.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.chunk_size, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_output, d_end):
    tensors = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(tensors[2])
    found = backward(d_output, d_end, *tensors, ctx.chunk_size, ctx.backend)
    present = (None if x is None else dx for x, dx in zip(tensors[:8], found, strict=True))
    return *present, *[None] * 3


forward.register_autograd(_gradients, setup_context=_setup_context)


@torch.library.custom_op("supra::fft_conv", mutates_args=())
def fft_forward(
    input: Tensor,
    kernel: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    block_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, D] and final state [N, L - 1, H, D]; kernel and state of one dtype."""
    with without_autocast(input.device):
        return fft.forward(input, kernel, state, cu_seqlens, block_size)


@torch.library.custom_op("supra::fft_conv_backward", mutates_args=())
def fft_backward(
    d_output: Tensor,
    d_end: Tensor | None,
    input: Tensor,
    kernel: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    block_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, kernel and state; empty for an absent one."""
    with without_autocast(input.device):
        results = fft.backward(d_output, d_end, input, kernel, state, cu_seqlens, block_size)
    return tuple(input.new_empty(0) if x is None else x for x in results)


@fft_forward.register_fake
def _(input, kernel, state, cu_seqlens, block_size):
    count = sequences(input, cu_seqlens)
    end = kernel.new_empty(count, kernel.shape[1] - 1, *input.shape[2:])
    return input.new_empty(input.shape), end


@fft_backward.register_fake
def _(d_output, d_end, *inputs_and_sizes):
    first, *_ = inputs = inputs_and_sizes[:3]
    return tuple(first.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup_fft_context(ctx, inputs, output):
    *tensors, ctx.block_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _fft_gradients(ctx, d_output, d_end):
    tensors = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(tensors[0])
    found = fft_backward(d_output, d_end, *tensors, ctx.block_size)
    present = (None if x is None else dx for x, dx in zip(tensors[:3], found, strict=True))
    return *present, None, None


fft_forward.register_autograd(_fft_gradients, setup_context=_setup_fft_context)
