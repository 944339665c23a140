"""Triton kernels of gated linear attention: states, and their gradients.

Legend as in channel_scores.py; channel_gradients.py has the other gradients.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.channel_decay import entering_decay, leaving_decay


@triton.jit
def chunk_states(
    key, value, sums, whole, state, states, end_state, seqs, heads,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States before every chunk and after the last, one block [BLOCK_K, BLOCK_V] a program.

    grid: (N * Hkv * blocks,).
    """
    lane, n, head, _, _, columns_k, columns_v = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    rows = tl.arange(0, TILE)
    row, begin, tokens, first = locate.sequence(n, seqs, TILE)
    key = locate.at(key, row, begin, head)
    value = locate.at(value, row, begin, head)
    sums = locate.dense(sums, row, begin, head, heads, seqs, KEY_WIDTH)
    sums_step = tl.cast(sums.time, tl.int64)  # made of heads, up to 21 more registers
    whole += locate.slot_offset(first, head, heads, KEY_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += locate.slot_offset(first + n, head, heads, state_size)
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if state is not None:
        state += lane * state_size
        acc = tiles.load_state(state, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)

    for c in range(0, tl.cdiv(tokens, TILE)):
        kept = tiles.narrow(acc, PRECISION)
        tiles.store_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, kept)
        states += tl.cast(heads, tl.int64) * state_size
        left, at = tokens - c * TILE, tl.cast(c * TILE, tl.int64)
        k = tiles.load_rows(locate.skip(key, at), rows, left, columns_k, KEY_WIDTH)
        v_at = locate.skip(value, at)
        v = tiles.load_rows(v_at, rows, left, columns_v, VALUE_WIDTH)
        k *= leaving_decay(locate.skip(sums, at), rows, left, columns_k, KEY_WIDTH)
        acc *= tiles.load_vector(whole + c * sums_step, 1, columns_k, KEY_WIDTH)[:, None]
        acc = tiles.dot(tl.trans(k), v, acc, PRECISION)
    kept = tiles.narrow(acc, PRECISION)
    tiles.store_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, kept)
    if end_state is not None:
        base = end_state + lane * state_size
        tiles.store_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, acc)


@triton.jit
def chunk_d_states(
    query, d_output, sums, whole, states, d_end, d_states, d_whole, d_state, seqs, heads, chunks,
    scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_BONUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the state after every chunk, from the last chunk to the first; heads = Hkv.

    grid: (N * Hkv * blocks,). d_whole [blocks of V, chunks, Hkv, K] gets the gradient of the log of
    every chunk's whole decay.
    """
    lane, n, head, _, block_v, columns_k, columns_v = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    rows = tl.arange(0, TILE)
    row, begin, tokens, first = locate.sequence(n, seqs, TILE)
    query = locate.at(query, row, begin, head * QUERIES)
    d_output = locate.at(d_output, row, begin, head * QUERIES)
    sums = locate.dense(sums, row, begin, head, heads, seqs, KEY_WIDTH)
    sums_step = tl.cast(heads, tl.int64) * KEY_WIDTH
    whole += locate.slot_offset(first, head, heads, KEY_WIDTH)
    slot = block_v * tl.cast(chunks, tl.int64) + first
    d_whole += locate.slot_offset(slot, head, heads, KEY_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += locate.slot_offset(first + n, head, heads, state_size)
    d_states += locate.slot_offset(first, head, heads, state_size)
    state_step = tl.cast(heads, tl.int64) * state_size
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if d_end is not None:
        d_end += lane * state_size
        acc = tiles.load_state(d_end, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)

    count = tl.cdiv(tokens, TILE)
    for back in range(0, count):
        c = count - 1 - back
        base, kept = d_states + c * state_step, tiles.narrow(acc, PRECISION)
        tiles.store_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, kept)
        s = tiles.load_state(states + c * state_step, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
        acc *= tiles.load_vector(whole + c * sums_step, 1, columns_k, KEY_WIDTH)[:, None]
        along = tl.sum(s.to(tl.float32) * acc, 1)
        tiles.store_vector(d_whole + c * sums_step, columns_k, KEY_WIDTH, along)
        left, at = tokens - c * TILE, tl.cast(c * TILE, tl.int64)
        sums_at = locate.skip(sums, at)
        decay = scale * entering_decay(sums_at, rows, left, columns_k, KEY_WIDTH, HAS_BONUS)
        for r in range(0, QUERIES):
            q_at = locate.skip_heads(locate.skip(query, at), r)
            d_at = locate.skip_heads(locate.skip(d_output, at), r)
            q = tiles.load_rows(q_at, rows, left, columns_k, KEY_WIDTH) * decay
            do = tiles.load_rows(d_at, rows, left, columns_v, VALUE_WIDTH)
            acc = tiles.dot(tl.trans(q), do, acc, PRECISION)

    if d_state is not None:
        base = d_state + lane * state_size
        tiles.store_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, acc)
