"""The chunked form as torch custom ops, one for each direction, so that torch.compile, activation
checkpointing and autograd treat it as they do any operator of torch.

A backend is a module with `chunk_forward` and `chunk_backward`, which take and return what the ops
below do, an absent tensor being None.
"""

import torch
from torch import Tensor

from supra.kernels.backends import without_autocast
from supra.kernels.checks import state_dtype
from supra.kernels.linear_attention import torch as torch_backend


@torch.library.custom_op("supra::linear_attention", mutates_args=())
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    normalized: bool,
    scale: float,
    eps: float,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, T, Hq, V], final memory and normalizer, and the sums of the weights [B, T, Hq].

    memory and normalizer: the initial state, float32 or float64, or None for zeros. The last two
    results are empty when not normalized.
    """
    with without_autocast(query.device):
        results = _module(backend).chunk_forward(
            query, key, value, log_decay, memory, normalizer, cu_seqlens,
            normalized=normalized, scale=scale, eps=eps, chunk_size=chunk_size,
        )  # fmt: skip
    return tuple(query.new_empty(0) if x is None else x.contiguous() for x in results)


@torch.library.custom_op("supra::linear_attention_backward", mutates_args=())
def backward(
    d_output: Tensor,
    d_memory: Tensor | None,
    d_normalizer: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    output: Tensor,
    weights: Tensor,
    normalized: bool,
    scale: float,
    eps: float,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, log_decay, memory and normalizer; empty for absent ones."""
    with without_autocast(query.device):
        results = _module(backend).chunk_backward(
            d_output, d_memory, d_normalizer, query, key, value, log_decay, memory, normalizer,
            cu_seqlens, output, weights,
            normalized=normalized, scale=scale, eps=eps, chunk_size=chunk_size,
        )  # fmt: skip
    return tuple(query.new_empty(0) if x is None else x.contiguous() for x in results)


@torch.library.custom_op("supra::linear_attention_step", mutates_args=("memory", "normalizer"))
def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    memory: Tensor,
    normalizer: Tensor | None,
    scale: float,
    eps: float,
) -> Tensor:
    """Output of the recurrence token by token in Triton; the state is updated in place.

    torch's recurrent form needs no op of its own: it is made of torch's.
    """
    from supra.kernels.linear_attention import triton as triton_backend

    return triton_backend.recurrent(
        query, key, value, log_decay, memory, normalizer, scale=scale, eps=eps
    )


def _module(backend: str):
    if backend == "torch":
        return torch_backend
    from supra.kernels.linear_attention import triton as triton_backend  # not everybody has triton

    return triton_backend


@forward.register_fake
def _(query, key, value, log_decay, memory, normalizer, cu_seqlens, normalized, *_):
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads = key.shape[2] if log_decay is None else log_decay.shape[-1]
    state = (sequences, heads, key.shape[3], value.shape[3])
    dtype = state_dtype(query, key, value)
    return (
        value.new_empty(*query.shape[:3], value.shape[3]),
        query.new_empty(state, dtype=dtype),
        query.new_empty(state[:3], dtype=dtype) if normalized else query.new_empty(0),
        query.new_empty(query.shape[:3], dtype=dtype) if normalized else query.new_empty(0),
    )


@backward.register_fake
def _(d_output, d_memory, d_normalizer, query, key, value, log_decay, memory, normalizer, *_):
    inputs = (query, key, value, log_decay, memory, normalizer)
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


@step.register_fake
def _(query, key, value, *_):
    return value.new_empty(*query.shape[:3], value.shape[3])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.normalized, ctx.scale, ctx.eps, ctx.chunk_size, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[0], output[3])
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_output, d_memory, d_normalizer, _d_weights):
    tensors = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(tensors[-2])
    options = (ctx.normalized, ctx.scale, ctx.eps, ctx.chunk_size, ctx.backend)
    if not ctx.normalized:
        d_normalizer = None
    found = backward(d_output, d_memory, d_normalizer, *tensors, *options)
    present = (None if x is None else dx for x, dx in zip(tensors[:6], found, strict=True))
    return *present, *[None] * 6


forward.register_autograd(_gradients, setup_context=_setup_context)
