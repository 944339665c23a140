"""The recurrence token by token on GPUs: linear attention with any decay, and the delta rule."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from supra.kernels import locate, plan, tiles
from supra.kernels.launch import Rows


def decode(x: Any, state_heads: int, state: Tensor, **own: Any) -> Tensor:
    """Output [B, T, Hq, V]; the state [B, state_heads, K, V] is updated in place.

    x: Inputs of an operation. own: arguments of the kernel, None or absent where they take no part.
    """
    log_decay = x.log_decay
    channels = log_decay is not None and log_decay.dim() == 4
    if channels:
        log_decay = plan.contiguous_rows(log_decay)
    absent = dict.fromkeys(("beta", "bonus", "normalizer", "end_normalizer", "eps"))
    own |= {"log_decay": Rows.of(log_decay), "state": state, "CHANNELS": channels}
    own["STATES"] = state_heads // x.key.shape[2]
    return plan.recurrent_steps(recurrent_steps, x, state_heads, **(absent | own))


@triton.jit
def recurrent_steps(
    query, key, value, beta, log_decay, bonus, state, normalizer, end_normalizer, output,
    length, heads, scale, eps,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One block of the state in registers, from where it is written back; heads: of the state.

    grid: (B * heads * blocks of V,). beta: None but for the delta rule. log_decay: None, per head,
    or with CHANNELS per key channel. bonus: weight of a token in its own output, which then reads
    the state before it. The normalizer, which all blocks of a head read, ends up in end_normalizer.
    """
    lane, n, head, _, block, columns_k, columns_v = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    if beta is not None:  # made by locate, up to 8 more registers
        columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    query = locate.at(query, n, 0, head * QUERIES, columns_k)
    key = locate.at(key, n, 0, head // STATES, columns_k)
    value = locate.at(value, n, 0, head // STATES, columns_v)
    output += (
        locate.dense_offset(n, 0, length, head * QUERIES, heads * QUERIES, VALUE_WIDTH) + columns_v
    )
    state += lane * (KEY_WIDTH * VALUE_WIDTH)
    s = tiles.load_state(state, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
    if normalizer is not None:
        z = tiles.load_vector(normalizer + lane * KEY_WIDTH, 1, columns_k, KEY_WIDTH)
    for t in range(0, length):
        k = tiles.load_token(key, t, columns_k, KEY_WIDTH)
        v_at = locate.skip(value, tl.cast(t, tl.int64)).data
        v = tl.load(v_at, mask=columns_v < VALUE_WIDTH, other=0.0)  # made float32 only where used
        if beta is not None:
            b = tl.load(locate.at(beta, n, t, head).data)
        before = s
        if CHANNELS:
            g = tiles.load_token(
                locate.at(log_decay, n, 0, head, columns_k), t, columns_k, KEY_WIDTH
            )
            s *= tl.exp(g)[:, None]
        elif log_decay is not None:
            a = tl.exp(tl.load(locate.at(log_decay, n, t, head).data).to(tl.float32))
            s *= a
            if normalizer is not None:
                z *= a
        written = v.to(tl.float32)
        if beta is not None:
            written = b.to(tl.float32) * (written - tl.sum(k[:, None] * s, 0))
        s += k[:, None] * written[None, :]
        if normalizer is not None:
            z += k
        for r in range(0, QUERIES):
            q = tiles.load_token(locate.skip_heads(query, r), t, columns_k, KEY_WIDTH)
            if bonus is not None:
                base = bonus + (head * QUERIES + r) * KEY_WIDTH
                u = tiles.load_vector(base, 1, columns_k, KEY_WIDTH).to(tl.float32)
                out = tl.sum(q[:, None] * before, 0) + tl.sum(q * u * k, 0) * written
            else:
                out = tl.sum(q[:, None] * s, 0)
            if normalizer is not None:
                out /= tl.sum(q * z, 0) + eps
            else:
                out *= scale
            base = output + locate.dense_offset(0, t, length, r, heads * QUERIES, VALUE_WIDTH)
            tl.store(base, out, mask=columns_v < VALUE_WIDTH)
    tiles.store_state(state, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, s)
    if normalizer is not None and block == 0:
        tiles.store_vector(end_normalizer + lane * KEY_WIDTH, columns_k, KEY_WIDTH, z)
