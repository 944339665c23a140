"""Triton kernels of gated linear attention: states, and the recurrent form.

Legend as in channel_scores.py, which has the kernels of scores and outputs.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.channel_decay import leaving_decay


@triton.jit
def chunk_states(
    key, value, sums, whole, state, states, end_state, seqs, heads, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_END: tl.constexpr, PRECISION: tl.constexpr,
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
        k = tiles.load_rows(locate.skip(key, c * TILE), rows, left, columns_k, KEY_WIDTH)
        v_at = locate.skip(value, c * TILE)
        v = tiles.load_rows(v_at, rows, left, columns_v, VALUE_WIDTH)
        k *= leaving_decay(locate.skip(sums, c * TILE), rows, left, columns_k, KEY_WIDTH)
        acc *= tiles.load_vector(whole + c * sums_step, 1, columns_k, KEY_WIDTH)[:, None]
        acc = tiles.dot(tl.trans(k), v, acc, PRECISION)
    kept = tiles.narrow(acc, PRECISION)
    tiles.store_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, kept)
    if HAS_END:
        base = end_state + lane * state_size
        tiles.store_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, acc)
