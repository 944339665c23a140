"""Triton kernels of Kimi Delta Attention beside those that it shares.

Legend as in channel_scores.py and delta_forward.py; a chunk is one tile, so that CHUNK = TILE.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.channel_decay import entering_decay, leaving_decay
from supra.kernels.channel_gradients import read_back
from supra.kernels.channel_scores import pair_scores
from supra.kernels.delta_forward import invert, not_zero


@triton.jit
def chunk_decayed(
    x, sums, found, cu_seqlens, chunk_offsets, x_batch, x_time, x_head, sequences, length, heads,
    KEY_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, QUERIES: tl.constexpr,
    ENTERING: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of x [B, T, heads, K] with the decay since their chunk began, or else until it ends.

    grid: (chunks * blocks of K, heads).
    """
    _, _, head, _, row, token, left, rows, columns = locate.chunk(
        cu_seqlens, chunk_offsets, sequences, length, KEY_WIDTH, BLOCK_K, TILE, PACKED
    )
    if left <= 0:
        return
    kv_heads, kv_head = heads // QUERIES, head // QUERIES
    x += locate.offset(row, x_batch, token, x_time, head, x_head)
    tile = tiles.load(x, x_time, rows, left, columns, KEY_WIDTH)
    sums += locate.dense_offset(row, token, length, kv_head, kv_heads, KEY_WIDTH)
    step = kv_heads * KEY_WIDTH
    if ENTERING:
        decay = entering_decay(sums, step, rows, left, columns, KEY_WIDTH, False)
    else:
        decay = leaving_decay(sums, step, rows, left, columns, KEY_WIDTH)
    found += locate.dense_offset(row, token, length, head, heads, KEY_WIDTH)
    kept = tiles.narrow(tile * decay, PRECISION)
    tiles.store(found, heads * KEY_WIDTH, rows, left, columns, KEY_WIDTH, kept)


@triton.jit
def chunk_inverse(
    key, beta, sums, inverse, cu_seqlens, chunk_offsets,
    key_batch, key_time, key_head, beta_batch, beta_time, beta_head, sequences, length, heads,
    KEY_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, LEVELS: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """T of every chunk; grid: (chunks, Hkv)."""
    _, _, head, _, row, token, left, _, _ = locate.chunk(
        cu_seqlens, chunk_offsets, sequences, length, 1, 1, TILE, PACKED
    )
    if left <= 0:
        return
    rows = tl.arange(0, TILE)
    key += locate.offset(row, key_batch, token, key_time, head, key_head)
    sums += locate.dense_offset(row, token, length, head, heads, KEY_WIDTH)
    below, _ = pair_scores(
        key, key_time, key, key_time, sums, heads * KEY_WIDTH, None, head, rows, left,
        KEY_WIDTH, BLOCK_K, LEVELS, False, PRECISION,
    )  # fmt: skip
    beta += locate.offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tiles.load_vector(beta, beta_time, rows, left)
    found = invert(below * not_zero(b)[None, :], rows, SOLVE)
    base = inverse + locate.dense_offset(row, token, length, head, heads, TILE)
    tiles.store(base, heads * TILE, rows, left, rows, TILE, tiles.narrow(found, PRECISION))


@triton.jit
def chunk_d_written(
    d_output, scores, d_written, cu_seqlens, chunk_offsets, d_batch, d_time, d_head,
    sequences, length, heads, scale,
    VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du from the outputs of the chunk; heads = Hkv. grid: (chunks * blocks of V, Hkv)."""
    _, _, head, _, row, token, left, rows, columns_v = locate.chunk(
        cu_seqlens, chunk_offsets, sequences, length, VALUE_WIDTH, BLOCK_V, TILE, PACKED
    )
    if left <= 0:
        return
    place = locate.dense_offset(row, token, length, head, heads, 1)
    d_output += locate.offset(row, d_batch, token, d_time, head * QUERIES, d_head)
    acc = read_back(
        scores + place * QUERIES * TILE, d_output, d_time, d_head, heads, rows, left, columns_v,
        VALUE_WIDTH, TILE, QUERIES, PRECISION,
    )  # fmt: skip
    kept, d_written = tiles.narrow(acc * scale, PRECISION), d_written + place * VALUE_WIDTH
    tiles.store(d_written, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, kept)


@triton.jit
def chunk_d_whole(
    whole, states, d_states, d_whole, cu_seqlens, chunk_offsets, sequences, length, heads,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradient of the logs of the chunks' whole decays; grid: (chunks * blocks of K, Hkv)."""
    chunk, _, head, n, _, _, left, _, columns = locate.chunk(
        cu_seqlens, chunk_offsets, sequences, length, KEY_WIDTH, BLOCK_K, TILE, PACKED
    )
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
