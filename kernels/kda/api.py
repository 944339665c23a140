"""Contract, validation and dispatch of Kimi Delta Attention (KDA).

For every head, with the state S in R^{K x V}, the log of the decay g_t in R^K and a writing
strength beta_t:

    S_t = (1 - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
    o_t = scale * q_t S_t

The state is a memory of values by keys. First every channel of the keys decays by itself; then what
the memory holds under k_t is moved towards v_t by the fraction beta_t. This is Kimi Linear (Kimi
Team 2025, arXiv 2510.26692, eq. 1). With one decay for all channels it is the gated delta rule.

The keys are used as they are given: normalize them to length 1 before. beta_t |k_t|^2 must stay
below 2, or the state may grow without bound.
"""

from typing import Any

from torch import Tensor

from supra.kernels import checks
from supra.kernels import delta_reference as reference
from supra.kernels.backends import choose
from supra.kernels.delta import Inputs
from supra.kernels.kda import torch as torch_backend
from supra.kernels.operators import Operator

OPERATION = "kda"
OPERATOR = Operator(OPERATION, Inputs, torch_backend, reference)
CHUNK = 32  # tokens, in torch


def chunk_kda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention over whole sequences, in chunks; for training and prefill.

    Other arguments, dtypes, gradients and errors (ValueError): see `supra.kernels.checks`.

    Args:
        query: [B, T, Hq, K].
        key: [B, T, Hkv, K], of length 1 (not checked). Hkv divides Hq; query head h reads the state
            of key head h // (Hq // Hkv).
        value: [B, T, Hkv, V].
        beta: [B, T, Hkv], writing strength in [0, 2) (not checked). 0 writes nothing.
        log_decay: [B, T, Hkv, K], natural log of the decay, <= 0 (not checked). Values down to
            -inf are allowed; a decay below 1e-30 counts as 0.
        scale: factor on the output.
        initial_state: [N, Hkv, K, V].

    Returns:
        Output [B, T, Hq, V] in value.dtype, and the final state [N, Hkv, K, V] or None.
    """
    inputs = _checked(
        query, key, value, beta, log_decay, initial_state, cu_seqlens, scale, chunk_size, backend
    )
    return OPERATOR.run(inputs, return_state)


def recurrent_kda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`chunk_kda` token by token; for in_place see `supra.kernels.checks`."""
    inputs = _checked(
        query, key, value, beta, log_decay, initial_state, None, scale, CHUNK, backend
    )
    return OPERATOR.run_by_token(inputs, "initial_state", initial_state, return_state, in_place)


def _checked(*arguments: Any) -> Inputs:
    """The arguments, with the state in the precision of the computation and the backend chosen."""
    x = Inputs(*arguments)
    state = checks.check_heads_inputs(x)
    checks.check_shape("beta", x.beta, x.key.shape[:3], "to fit key")
    checks.check_shape("log_decay", x.log_decay, x.key.shape, "[B, T, Hkv, K], as key is")
    limit = checks.limit_of_all_channels(x.key)
    backend = choose(OPERATION, x.backend, *x[:3], x.log_decay, limit=limit)
    return x._replace(state=state, backend=backend)
