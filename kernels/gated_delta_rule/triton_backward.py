"""Triton kernel of the gradient of what each token writes; legend as in delta_backward.py."""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.decay import decay_between


@triton.jit
def chunk_d_written(
    query, key, d_output, sums, d_written, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    sums_batch, sums_time, sums_head, sequences, length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du from the outputs of the chunk; grid: (chunks * blocks of V, Hkv)."""
    _, block, head, _, row, token, left, _, _ = locate.chunk(
        cu_seqlens, chunk_offsets, sequences, length, VALUE_WIDTH, BLOCK_V, CHUNK, PACKED
    )
    if left <= 0:
        return
    rows, columns_v = tl.arange(0, CHUNK), block * BLOCK_V + tl.arange(0, BLOCK_V)
    query += locate.offset(row, query_batch, token, query_time, head * QUERIES, query_head)
    d_output += locate.offset(row, d_batch, token, d_time, head * QUERIES, d_head)
    key += locate.offset(row, key_batch, token, key_time, head, key_head)
    if HAS_DECAY:
        sums += locate.offset(row, sums_batch, token, sums_time, head, sums_head)
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for r in range(0, QUERIES):
        query_at = query + r * tl.cast(query_head, tl.int64)
        scores = tiles.products(  # [key token, query token]
            key, key_time, left, query_at, query_time, left, rows, KEY_WIDTH, BLOCK_K, PRECISION
        )
        if HAS_DECAY:
            scores *= decay_between(tiles.load_pairs(sums, rows, left))
        scores = tl.where(rows[:, None] <= rows[None, :], scores * scale, 0.0)
        base = d_output + r * tl.cast(d_head, tl.int64)
        do = tiles.load(base, d_time, rows, left, columns_v, VALUE_WIDTH)
        acc = tiles.dot(scores, do, acc, PRECISION)
    d_written += locate.dense_offset(row, token, length, head, heads, VALUE_WIDTH)
    kept = tiles.narrow(acc, PRECISION)
    tiles.store(d_written, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, kept)
