"""Triton kernel of the gradient of what each token writes; legend as in delta_backward.py."""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.decay import decay_between


@triton.jit
def chunk_d_written(
    query, key, d_output, sums, d_written, seqs, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du from the outputs of the chunk; grid: (chunks * blocks of V, Hkv)."""
    _, block, head, _, row, token, left, _, _ = locate.chunk(seqs, VALUE_WIDTH, BLOCK_V, CHUNK)
    if left <= 0:
        return
    rows, columns_v = tl.arange(0, CHUNK), block * BLOCK_V + tl.arange(0, BLOCK_V)
    query = locate.at(query, row, token, head * QUERIES)
    d_output = locate.at(d_output, row, token, head * QUERIES)
    key = locate.at(key, row, token, head)
    if HAS_DECAY:
        sums = locate.at(sums, row, token, head)
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for r in range(0, QUERIES):
        query_at = locate.skip_heads(query, r)
        scores = tiles.products(  # [key token, query token]
            key, left, query_at, left, rows, KEY_WIDTH, BLOCK_K, PRECISION
        )
        if HAS_DECAY:
            scores *= decay_between(tiles.load_pairs(sums.data, rows, left))
        scores = tl.where(rows[:, None] <= rows[None, :], scores * scale, 0.0)
        base = locate.skip_heads(d_output, r)
        do = tiles.load_rows(base, rows, left, columns_v, VALUE_WIDTH)
        acc = tiles.dot(scores, do, acc, PRECISION)
    d_written += locate.dense_offset(row, token, seqs.length, head, heads, VALUE_WIDTH)
    kept = tiles.narrow(acc, PRECISION)
    tiles.store(d_written, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, kept)
