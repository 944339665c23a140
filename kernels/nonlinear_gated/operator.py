"""The chunked form as torch custom ops, one for each direction, so that torch.compile, activation
checkpointing and autograd treat it as they do any operator of torch.

A backend is a module with `chunk_forward` and `chunk_backward`, which take and return what the ops
below do, an absent tensor being None.
"""

import torch
from torch import Tensor

from supra.kernels.backends import without_autocast
from supra.kernels.checks import sequences, state_dtype
from supra.kernels.nonlinear_gated import torch as torch_backend
from supra.kernels.packing import count_chunks


@torch.library.custom_op("supra::nonlinear_gated", mutates_args=())
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    sweeps: int,
    tolerance: float,
    chunk_size: int,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, T, H, V], final state [N, H, K, V], and two without a gradient.

    Those are the states before every chunk, [chunks, H, K, V], which the backward pass begins from
    (none unless `save_states`), and [2, N, H], the largest residual and the most sweeps of a chunk.
    """
    with without_autocast(query.device):
        output, *rest = _module(backend).chunk_forward(
            query, key, value, log_decay, weight, state, cu_seqlens, scale=scale, sweeps=sweeps,
            tolerance=tolerance, chunk_size=chunk_size, save_states=save_states,
        )  # fmt: skip
    return output.contiguous(), *rest


@torch.library.custom_op("supra::nonlinear_gated_backward", mutates_args=())
def backward(
    d_output: Tensor,
    d_end: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    scale: float,
    sweeps: int,
    tolerance: float,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, log_decay, weight and state; empty for an absent one."""
    with without_autocast(query.device):
        results = _module(backend).chunk_backward(
            d_output, d_end, query, key, value, log_decay, weight, state, cu_seqlens, states,
            scale=scale, sweeps=sweeps, tolerance=tolerance, chunk_size=chunk_size,
        )  # fmt: skip
    return tuple(query.new_empty(0) if x is None else x.contiguous() for x in results)


@torch.library.custom_op("supra::nonlinear_gated_step", mutates_args=("state",))
def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor,
    scale: float,
) -> Tensor:
    """Output of the recurrence token by token in Triton; the state is updated in place.

    torch's recurrent form needs no op of its own: it is made of torch's.
    """
    return _module("triton").recurrent(query, key, value, log_decay, weight, state, scale=scale)


def _module(backend: str):
    if backend == "torch":
        return torch_backend
    from supra.kernels.nonlinear_gated import triton  # not everybody has triton

    return triton


@forward.register_fake
def _(query, key, value, log_decay, weight, state, cu_seqlens, *options):
    *_, chunk_size, save_states, backend = options
    unit = 16 if backend == "triton" else 1  # its tensors are as wide as launch.operands() makes
    widths = (-(-width // unit) * unit for width in weight.shape[1:])
    count = count_chunks(query, cu_seqlens, chunk_size) if save_states else 0
    wide = query.new_empty(0, dtype=state_dtype(query, key, value))
    number = sequences(query, cu_seqlens)
    return (
        value.new_empty(value.shape),
        wide.new_empty(number, *weight.shape),
        wide.new_empty(count, weight.shape[0], *widths),
        wide.new_empty(2, number, weight.shape[0]),
    )


@backward.register_fake
def _(d_output, d_end, query, key, value, log_decay, weight, state, *_):
    inputs = (query, key, value, log_decay, weight, state)
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


@step.register_fake
def _(query, key, value, *_):
    return value.new_empty(value.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.sweeps, ctx.tolerance, ctx.chunk_size, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx, d_output, d_end, *_):
    tensors = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(tensors[2])
    options = (ctx.scale, ctx.sweeps, ctx.tolerance, ctx.chunk_size, ctx.backend)
    found = backward(d_output, d_end, *tensors, *options)
    present = (None if x is None else dx for x, dx in zip(tensors[:6], found, strict=True))
    return *present, *[None] * 7


forward.register_autograd(_gradients, setup_context=_setup_context)
