"""Contract, validation and dispatch of causal linear attention with a decay per key channel.

For every head, with the state S in R^{K x V} and the log of the decay g_t in R^K:

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T

    o_t = scale * q_t S_t                                bonus=None
    o_t = scale * q_t (S_{t-1} + diag(u) k_t v_t^T)      bonus=u

The first is gated linear attention (GLA, Yang et al. 2023, eq. 3). The second is the "wkv" of
RWKV-6 (Peng et al. 2024, eq. 19), which reads the state before the token's own decay and insertion,
and weighs the token itself by u.
"""

from typing import Any

from torch import Tensor

from supra.kernels import checks
from supra.kernels.backends import choose
from supra.kernels.gated_linear_attention import reference
from supra.kernels.gated_linear_attention import torch as torch_backend
from supra.kernels.gated_linear_attention.inputs import Inputs
from supra.kernels.operators import Operator

OPERATION = "gated_linear_attention"
OPERATOR = Operator(OPERATION, Inputs, torch_backend, reference)
CHUNK = 64  # tokens, in torch


def chunk_gated_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with a decay per key channel over whole sequences, in chunks.

    Other arguments, dtypes, gradients and errors (ValueError): see `supra.kernels.checks`.

    Args:
        query: [B, T, Hq, K].
        key: [B, T, Hkv, K]. Hkv divides Hq; query head h reads key head h // (Hq // Hkv).
        value: [B, T, Hkv, V].
        log_decay: [B, T, Hkv, K], natural log of the decay, <= 0 (not checked). Values down to
            -inf are allowed; a decay below 1e-30 counts as 0.
        bonus: None for GLA, or [Hq, K], the weight of the current token in RWKV-6.
        scale: factor on the output.
        initial_state: [N, Hkv, K, V].

    Returns:
        Output [B, T, Hq, V] in value.dtype, and the final state [N, Hkv, K, V] or None.
    """
    inputs = _checked(
        query, key, value, log_decay, bonus, initial_state, cu_seqlens, scale, chunk_size, backend
    )
    return OPERATOR.run(inputs, return_state)


def recurrent_gated_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gated_linear_attention` token by token; for in_place see `supra.kernels.checks`."""
    inputs = _checked(
        query, key, value, log_decay, bonus, initial_state, None, scale, CHUNK, backend
    )
    return OPERATOR.run_by_token(inputs, "initial_state", initial_state, return_state, in_place)


def _checked(*arguments: Any) -> Inputs:
    """The arguments, with the state in the precision of the computation and the backend chosen."""
    x = Inputs(*arguments)
    state = checks.check_heads_inputs(x)
    checks.check_shape("log_decay", x.log_decay, x.key.shape, "[B, T, Hkv, K], as key is")
    checks.check_shape("bonus", x.bonus, x.query.shape[2:], "[Hq, K] to fit query")
    return x._replace(state=state, backend=choose(OPERATION, x.backend, *x[:4]))
