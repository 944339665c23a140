"""Triton kernels of Kimi Delta Attention beside those that it shares.

Legend as in channel_scores.py and delta_forward.py; a chunk is one tile, so that CHUNK = TILE.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.channel_decay import entering_decay, leaving_decay


@triton.jit
def chunk_decayed(
    x, sums, found, seqs, heads, KEY_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
    QUERIES: tl.constexpr, ENTERING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of x [B, T, heads, K] with the decay since their chunk began, or else until it ends.

    grid: (chunks * blocks of K, heads).
    """
    _, _, head, _, row, token, left, rows, columns = locate.chunk(seqs, KEY_WIDTH, BLOCK_K, TILE)
    if left <= 0:
        return
    kv_heads, kv_head = heads // QUERIES, head // QUERIES
    x = locate.at(x, row, token, head)
    tile = tiles.load_rows(x, rows, left, columns, KEY_WIDTH)
    sums = locate.dense(sums, row, token, kv_head, kv_heads, seqs, KEY_WIDTH)
    if ENTERING:
        decay = entering_decay(sums, rows, left, columns, KEY_WIDTH, False)
    else:
        decay = leaving_decay(sums, rows, left, columns, KEY_WIDTH)
    found += locate.dense_offset(row, token, seqs.length, head, heads, KEY_WIDTH)
    kept = tiles.narrow(tile * decay, PRECISION)
    tiles.store(found, heads * KEY_WIDTH, rows, left, columns, KEY_WIDTH, kept)


@triton.jit
def chunk_d_whole(
    whole, states, d_states, d_whole, seqs, heads, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of the logs of the chunks' whole decays; grid: (chunks * blocks of K, Hkv)."""
    chunk, _, head, n, _, _, left, _, columns = locate.chunk(seqs, KEY_WIDTH, BLOCK_K, TILE)
    if left <= 0:
        return
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += locate.slot_offset(chunk + n, head, heads, state_size)
    d_states += locate.slot_offset(chunk, head, heads, state_size)
    found = tl.zeros([BLOCK_K], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns_v = v0 + tl.arange(0, BLOCK_V)
        s = tiles.load_state(states, columns, columns_v, KEY_WIDTH, VALUE_WIDTH).to(tl.float32)
        ds = tiles.load_state(d_states, columns, columns_v, KEY_WIDTH, VALUE_WIDTH)
        found += tl.sum(s * ds.to(tl.float32), 1)
    at = locate.slot_offset(chunk, head, heads, KEY_WIDTH)
    found *= tiles.load_vector(whole + at, 1, columns, KEY_WIDTH)
    tiles.store_vector(d_whole + at, columns, KEY_WIDTH, found)
