"""The chunked form as torch custom ops, one for each direction, so that torch.compile, activation
checkpointing and autograd treat it as they do any operator of torch.

A backend is a module with `chunk_forward` and `chunk_backward`, which take and return what the ops
below do, an absent tensor being None.
"""

import torch
from torch import Tensor

from supra.kernels.backends import without_autocast
from supra.kernels.checks import state_dtype
from supra.kernels.gated_linear_attention import torch as torch_backend


@torch.library.custom_op("supra::gated_linear_attention", mutates_args=())
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, V] and final state [N, Hkv, K, V]; state is the initial one or None."""
    with without_autocast(query.device):
        output, end = _module(backend).chunk_forward(
            query, key, value, log_decay, bonus, state, cu_seqlens,
            scale=scale, chunk_size=chunk_size,
        )  # fmt: skip
    return output.contiguous(), end


@torch.library.custom_op("supra::gated_linear_attention_backward", mutates_args=())
def backward(
    d_output: Tensor,
    d_end: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, log_decay, bonus and state; empty for absent ones."""
    with without_autocast(query.device):
        results = _module(backend).chunk_backward(
            d_output, d_end, query, key, value, log_decay, bonus, state, cu_seqlens,
            scale=scale, chunk_size=chunk_size,
        )  # fmt: skip
    return tuple(query.new_empty(0) if x is None else x.contiguous() for x in results)


@torch.library.custom_op("supra::gated_linear_attention_step", mutates_args=("state",))
def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    state: Tensor,
    scale: float,
) -> Tensor:
    """Output of the recurrence token by token in Triton; the state is updated in place.

    torch's recurrent form needs no op of its own: it is made of torch's.
    """
    return _module("triton").recurrent(query, key, value, log_decay, bonus, state, scale=scale)


def _module(backend: str):
    if backend == "torch":
        return torch_backend
    from supra.kernels.gated_linear_attention import triton  # not everybody has triton

    return triton


@forward.register_fake
def _(query, key, value, log_decay, bonus, state, cu_seqlens, *_):
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, *key.shape[2:], value.shape[3])
    return (
        value.new_empty(*query.shape[:3], value.shape[3]),
        query.new_empty(shape, dtype=state_dtype(query, key, value)),
    )


@backward.register_fake
def _(d_output, d_end, query, key, value, log_decay, bonus, state, *_):
    inputs = (query, key, value, log_decay, bonus, state)
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


@step.register_fake
def _(query, key, value, *_):
    return value.new_empty(*query.shape[:3], value.shape[3])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.chunk_size, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_output, d_end):
    tensors = ctx.saved_tensors
    if d_output is None:
        query, value = tensors[0], tensors[2]
        d_output = value.new_zeros(*query.shape[:3], value.shape[3])
    found = backward(d_output, d_end, *tensors, ctx.scale, ctx.chunk_size, ctx.backend)
    present = (None if x is None else dx for x, dx in zip(tensors[:6], found, strict=True))
    return *present, *[None] * 4


forward.register_autograd(_gradients, setup_context=_setup_context)
