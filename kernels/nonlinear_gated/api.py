"""Contract, validation and dispatch of the nonlinear gated recurrence.

For every head, with the state S in R^{K x V}, a weight a of the same shape and f_t = exp(g_t):

    S_t = f_t S_{t-1} + (1 - f_t) tanh(a * S_{t-1} + k_t v_t^T)        o_t = scale * q_t S_t

an elementwise form of the nonlinear matrix state of M2RNN (arXiv 2603.14360). With a = 0 and a
small k v^T it is gated linear attention; with |a| < 1 it contracts; beyond 1 a number of the state
has two resting points.

No number of the state depends on another, so that Newton's method on all states of a chunk of
tokens takes a scan of scalars a sweep (DEER, Lim et al. 2023, arXiv 2309.12252; ParaRNN, Danieli et
al. 2025, arXiv 2510.21450). The Triton kernels hold a chunk in registers and go over the chunks in
turn; a chunk of C tokens is exact after C sweeps whatever a is, so that there is no weight with
which they fail. The torch backend computes token by token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import choose
from supra.kernels.nonlinear_gated import reference
from supra.kernels.nonlinear_gated import torch as torch_backend
from supra.kernels.nonlinear_gated.inputs import Inputs
from supra.kernels.operators import Operator

OPERATION = "nonlinear_gated"
OPERATOR = Operator(
    OPERATION,
    Inputs,
    torch_backend,
    reference,
    results=("output", "end", "states", "solved"),
    saved=("states",),
)
CHUNK_SIZES = {"torch": 64, "triton": 16, "reference": 1}
MAX_CHUNK = 64
SWEEPS, TOLERANCE = 4, 1e-6


class Convergence(NamedTuple):
    """How the chunks of each sequence and head were solved; zeros where tokens came one by one.

    residual: [N, H], the largest |S_t - f(S_{t-1})| that was left in any of them.
    sweeps: [N, H], int32, the most sweeps that one of them took.

    A nan is not counted: it is in the output.
    """

    residual: Tensor
    sweeps: Tensor


def chunk_nonlinear_gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    return_convergence: bool = False,
    cu_seqlens: Tensor | None = None,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Convergence]:
    """The recurrence over whole sequences.

    Other arguments, dtypes, gradients and errors (ValueError): see `supra.kernels.checks`.

    Args:
        query: [B, T, H, K].
        key: [B, T, H, K], as many heads as queries have.
        value: [B, T, H, V].
        log_decay: [B, T, H], natural log of f, <= 0 (not checked), down to -inf. A token with
            0 leaves the state as it is.
        weight: [H, K, V], a.
        scale: factor on the output.
        initial_state: [N, H, K, V].
        return_convergence: return a third value, Convergence.
        sweeps: sweeps of Newton's method that every chunk gets before its residual is looked at,
            >= 1. For triton only, as is tolerance.
        tolerance: a chunk whose residual is above it gets more sweeps, >= 0. States stay within
            one, or within the largest number they began with; residuals are seldom below 2e-7.
        chunk_size: tokens that triton solves for at once, a power of two up to 64. After so many
            tokens every backend keeps a state, K * V numbers per head, for the backward pass. None
            for 16 in triton and 64 in torch. It changes speed, memory and rounding only. Triton's
            backward pass also holds what each tile adds to a gradient: 3 KB per token and head of
            64 x 64, 12 KB of 128 x 128.

    Returns:
        Output [B, T, H, V] in value.dtype, and the final state or None.
    """
    _check_options(sweeps, tolerance, chunk_size)
    inputs = _checked(
        query, key, value, log_decay, weight, initial_state, cu_seqlens, scale, sweeps, tolerance,
        chunk_size, backend,
    )  # fmt: skip
    if inputs.backend == "reference":
        output, end = OPERATOR.run(inputs, return_state=True)
        solved = end.new_zeros(2, *end.shape[:2])
    else:
        output, end, _, solved = OPERATOR.forward(*inputs)
    end = end if return_state else None
    if not return_convergence:
        return output, end
    return output, end, Convergence(solved[0], solved[1].to(torch.int32))


def recurrent_nonlinear_gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`chunk_nonlinear_gated` token by token; for in_place see `supra.kernels.checks`."""
    inputs = _checked(
        query, key, value, log_decay, weight, initial_state, None, scale, SWEEPS, TOLERANCE, None,
        backend,
    )  # fmt: skip
    return OPERATOR.run_by_token(inputs, "initial_state", initial_state, return_state, in_place)


def _checked(*arguments: Any) -> Inputs:
    """Inputs, with the state in the precision of the computation and the backend chosen.

    arguments: the fields of Inputs but for save_states.
    """
    *given, backend = arguments
    x = Inputs(*given, False, backend)
    state, heads = checks.check_heads_inputs(x), x.query.shape[2]
    if x.key.shape[2] != heads:
        raise ValueError(
            f"key (shape {checks.shape(x.key)}) must have {heads} heads, as query has; repeat them"
        )
    checks.check_shape("log_decay", x.log_decay, x.query.shape[:3], "[B, T, H]")
    shape = (heads, x.query.shape[3], x.value.shape[3])
    checks.check_shape("weight", x.weight, shape, "[H, K, V]: one number for each of the state")
    backend = choose(OPERATION, backend, *x[:5])
    chunk_size = x.chunk_size or CHUNK_SIZES[backend]
    save_states = checks.needs_gradient(*x[:5], state)
    return x._replace(state=state, chunk_size=chunk_size, save_states=save_states, backend=backend)


def _check_options(sweeps: int, tolerance: float, chunk_size: int | None) -> None:
    checks.check_positive(sweeps=sweeps)
    if not tolerance >= 0:
        raise ValueError(f"tolerance (={tolerance}) must be >= 0")
    sizes = [1 << n for n in range(MAX_CHUNK.bit_length())]
    if chunk_size is not None and chunk_size not in sizes:
        raise ValueError(f"chunk_size (={chunk_size}) must be a power of two up to {MAX_CHUNK}")
