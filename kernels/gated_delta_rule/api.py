"""Contract, validation and dispatch of the gated delta rule.

For every head, with the state S in R^{K x V}, a decay exp(g_t) and a writing strength beta_t:

    S_t = exp(g_t) (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    o_t = scale * q_t S_t

The state is a memory of values by keys: what it holds under k_t is moved towards v_t by the
fraction beta_t, after all of it has decayed. This is Gated DeltaNet (Yang, Kautz & Hatamizadeh
2024, eq. 10); without decay it is DeltaNet (Schlag et al. 2021; Yang et al. 2024).

The keys are used as they are given: normalize them to length 1 before. beta_t |k_t|^2 must stay
below 2, or the state may grow without bound.
"""

from typing import Any

from torch import Tensor

from supra.kernels import checks
from supra.kernels import delta_reference as reference
from supra.kernels.backends import choose
from supra.kernels.delta import Inputs
from supra.kernels.gated_delta_rule import torch as torch_backend
from supra.kernels.operators import Operator

OPERATION = "gated_delta_rule"
OPERATOR = Operator(OPERATION, Inputs, torch_backend, reference)
CHUNK = 32  # tokens, in torch


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule over whole sequences, in chunks; for training and prefill.

    Other arguments, dtypes, gradients and errors (ValueError): see `supra.kernels.checks`.

    Args:
        query: [B, T, Hq, K].
        key: [B, T, Hkv, K], of length 1 (not checked). Hkv divides Hq; query head h reads the state
            of key head h // (Hq // Hkv).
        value: [B, T, Hkv, V].
        beta: [B, T, Hkv], writing strength in [0, 2) (not checked). 0 writes nothing.
        log_decay: natural log of the decay, <= 0 (not checked). None for no decay, [Hkv] for
            a constant per head, [B, T, Hkv] per token. Values down to -inf are allowed: what lies
            below -104 counts as -104, which is exp() = 0 in float32, and gets no gradient.
        scale: factor on the output.
        initial_state: [N, Hkv, K, V].

    Returns:
        Output [B, T, Hq, V] in value.dtype, and the final state [N, Hkv, K, V] or None.
    """
    inputs = _checked(
        query, key, value, beta, log_decay, initial_state, cu_seqlens, scale, chunk_size, backend
    )
    return OPERATOR.run(inputs, return_state)


def recurrent_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gated_delta_rule` token by token; for in_place see `supra.kernels.checks`."""
    inputs = _checked(
        query, key, value, beta, log_decay, initial_state, None, scale, CHUNK, backend
    )
    return OPERATOR.run_by_token(inputs, "initial_state", initial_state, return_state, in_place)


def _checked(*arguments: Any) -> Inputs:
    """The arguments, with the state in the precision of the computation and the backend chosen."""
    x = Inputs(*arguments)
    log_decay, per_token = x.log_decay, x.key.shape[:3]
    state = checks.check_heads_inputs(x)
    checks.check_shape("beta", x.beta, per_token, "to fit key")
    if log_decay is not None and log_decay.shape not in (per_token, per_token[2:]):
        raise ValueError(
            f"log_decay (shape {checks.shape(log_decay)}) must be {list(per_token[2:])} or "
            f"{list(per_token)} to fit key"
        )
    limit = checks.limit_of_all_channels(x.key)
    return x._replace(state=state, backend=choose(OPERATION, x.backend, *x[:3], limit=limit))
