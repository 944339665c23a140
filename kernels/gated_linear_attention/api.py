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
OPERATOR = Operator(OPERATION, Inputs, torch_backend, reference, package=__package__)
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

    Args:
        query: [B, T, Hq, K], any floating dtype, as all inputs. B, T >= 1.
        key: [B, T, Hkv, K]. Hkv divides Hq; query head h reads key head h // (Hq // Hkv).
        value: [B, T, Hkv, V].
        log_decay: [B, T, Hkv, K], natural log of the decay, <= 0 (not checked: that would
            synchronise a GPU). Values down to -inf are allowed; a decay below 1e-30 counts as 0.
        bonus: None for GLA, or [Hq, K], the weight of the current token in RWKV-6.
        scale: factor on the output.
        initial_state: [N, Hkv, K, V], the state before the first token; None for zeros. N is the
            batch size, or the number of packed sequences.
        return_state: also return the state after the last token. The decay of the next token is not
            yet applied to it.
        cu_seqlens: [N + 1] integers that rise from 0 to T: the bounds of N sequences packed in one
            row (B = 1). Each has its own state and sees no other; a sequence may be empty. The
            torch backend reads them on the host; triton does not, and trusts bounds on a GPU.
        chunk_size: tokens per chunk in torch, >= 1; powers of two are fastest. It changes speed and
            rounding only. Triton has its own chunks.
        backend: "auto", "torch", "triton" or "reference" (float64, token by token). "auto" takes
            triton for float32 and 16-bit inputs on a GPU that it can use, and torch for all else.
            A backend that is asked for by name runs or raises.

    Returns:
        Output [B, T, Hq, V] in value.dtype, and the final state or None. The state is float32, or
        float64 for float64 inputs; so is every computation, also under autocast. Gradients flow to
        and from all tensors, the states included; second derivatives need backend="reference".

    Raises:
        ValueError: shapes, sizes or names that do not fit, or a backend that cannot run.
    """
    checks.check_positive(chunk_size=chunk_size)
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
    """The same function token by token; for decoding, where T = 1 is one short step.

    Arguments, results and errors are those of `chunk_gated_linear_attention`, and one more:

    in_place: write the final state into the tensor initial_state and return that tensor, so that a
        step allocates no state. It must be contiguous, in the dtype of the final state, and need no
        gradient. Otherwise the given state is not changed.

    With backend="triton", a call that needs gradients runs the chunked kernels.
    """
    inputs = _checked(
        query, key, value, log_decay, bonus, initial_state, None, scale, CHUNK, backend
    )
    return OPERATOR.run_by_token(inputs, "initial_state", initial_state, return_state, in_place)


def _checked(*arguments: Any) -> Inputs:
    """The arguments, with the state in the precision of the computation and the backend chosen."""
    x = Inputs(*arguments)
    query, key, value, log_decay, bonus = tensors = x[:5]
    checks.check_heads(query, key, value)
    checks.check_tensors(query=query, key=key, value=value, log_decay=log_decay, bonus=bonus)
    checks.check_shape("log_decay", log_decay, key.shape, "[B, T, Hkv, K], as key is")
    checks.check_shape("bonus", bonus, query.shape[2:], "[Hq, K] to fit query")
    state = checks.check_heads_state(x.state, query, key, value, x.cu_seqlens)
    backend = choose(OPERATION, x.backend, query, key, value, log_decay)
    return Inputs(*tensors, state, x.cu_seqlens, x.scale, x.chunk_size, backend)
