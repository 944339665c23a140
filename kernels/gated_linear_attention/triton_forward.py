"""Triton kernels of gated linear attention: states, and the recurrent form.

Legend as in channel_scores.py, which has the kernels of scores and outputs.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.channel_decay import leaving_decay


@triton.jit
def chunk_states(
    key, value, sums, whole, state, states, end_state, cu_seqlens, chunk_offsets,
    key_batch, key_time, key_head, value_batch, value_time, value_head, length, heads,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_END: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States before every chunk and after the last, one block [BLOCK_K, BLOCK_V] a program.

    grid: (N * Hkv * blocks,).
    """
    lane, n, head, _, _, columns_k, columns_v = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    rows = tl.arange(0, TILE)
    row, begin, tokens, first = locate.sequence(n, cu_seqlens, chunk_offsets, length, TILE, PACKED)
    key += locate.offset(row, key_batch, begin, key_time, head, key_head)
    value += locate.offset(row, value_batch, begin, value_time, head, value_head)
    key_step, value_step = tl.cast(key_time, tl.int64), tl.cast(value_time, tl.int64)
    sums += locate.dense_offset(row, begin, length, head, heads, KEY_WIDTH)
    sums_step = tl.cast(heads, tl.int64) * KEY_WIDTH
    whole += locate.slot_offset(first, head, heads, KEY_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += locate.slot_offset(first + n, head, heads, state_size)
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_INITIAL:
        state += lane * state_size
        acc = tiles.load_state(state, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)

    for c in range(0, tl.cdiv(tokens, TILE)):
        kept = tiles.narrow(acc, PRECISION)
        tiles.store_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, kept)
        states += tl.cast(heads, tl.int64) * state_size
        left = tokens - c * TILE
        k = tiles.load(key + c * TILE * key_step, key_time, rows, left, columns_k, KEY_WIDTH)
        v_at = value + c * TILE * value_step
        v = tiles.load(v_at, value_time, rows, left, columns_v, VALUE_WIDTH)
        sums_at = sums + c * TILE * sums_step
        k *= leaving_decay(sums_at, heads * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH)
        acc *= tiles.load_vector(whole + c * sums_step, 1, columns_k, KEY_WIDTH)[:, None]
        acc = tiles.dot(tl.trans(k), v, acc, PRECISION)
    kept = tiles.narrow(acc, PRECISION)
    tiles.store_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, kept)
    if HAS_END:
        base = end_state + lane * state_size
        tiles.store_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, acc)


@triton.jit
def recurrent_steps(
    query, key, value, log_decay, bonus, state, output,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, decay_batch, decay_time, decay_head,
    length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_BONUS: tl.constexpr,
):  # fmt: skip
    """The recurrence token by token with the state in registers; heads = Hkv.

    grid: (B * Hkv * blocks of V,). A program reads and writes its own block of the state only.
    """
    lane, n, head, _, _, columns_k, columns_v = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    query += locate.offset(n, query_batch, 0, query_time, head * QUERIES, query_head) + columns_k
    key += locate.offset(n, key_batch, 0, key_time, head, key_head) + columns_k
    value += locate.offset(n, value_batch, 0, value_time, head, value_head) + columns_v
    log_decay += locate.offset(n, decay_batch, 0, decay_time, head, decay_head) + columns_k
    output += (
        locate.dense_offset(n, 0, length, head * QUERIES, heads * QUERIES, VALUE_WIDTH) + columns_v
    )
    state += lane * (KEY_WIDTH * VALUE_WIDTH)
    s = tiles.load_state(state, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
    for t in range(0, length):
        v = tiles.load_token(value, value_time, t, columns_v, VALUE_WIDTH)
        g = tiles.load_token(log_decay, decay_time, t, columns_k, KEY_WIDTH)
        k = tiles.load_token(key, key_time, t, columns_k, KEY_WIDTH)  # first, 4 more registers
        before = s
        s = s * tl.exp(g)[:, None] + k[:, None] * v[None, :]
        for r in range(0, QUERIES):
            q_at = query + r * tl.cast(query_head, tl.int64)
            q = tiles.load_token(q_at, query_time, t, columns_k, KEY_WIDTH)
            if HAS_BONUS:
                base = bonus + (head * QUERIES + r) * KEY_WIDTH
                u = tiles.load_vector(base, 1, columns_k, KEY_WIDTH)
                out = tl.sum(q[:, None] * before, 0) + tl.sum(q * u.to(tl.float32) * k, 0) * v
            else:
                out = tl.sum(q[:, None] * s, 0)
            base = output + locate.dense_offset(0, t, length, r, heads * QUERIES, VALUE_WIDTH)
            tl.store(base, out * scale, mask=columns_v < VALUE_WIDTH)
    tiles.store_state(state, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, s)
