"""Triton kernels of the gated delta rule: outputs, and gradients of what each token writes.

Legend as in delta_forward.py and delta_backward.py.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.decay import decay_between, entering_decay


@triton.jit
def chunk_output(
    query, key, beta, sums, errors, states, output, seqs, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs; heads = Hkv. grid: (chunks * blocks of V, Hq)."""
    chunk, block, query_at, n, row, token, left, _, _ = locate.chunk(
        seqs, VALUE_WIDTH, BLOCK_V, CHUNK
    )
    head = query_at // QUERIES
    if left <= 0:
        return
    rows, columns_v = tl.arange(0, CHUNK), block * BLOCK_V + tl.arange(0, BLOCK_V)
    query = locate.at(query, row, token, query_at)
    key = locate.at(key, row, token, head)
    states += locate.slot_offset(chunk + n, head, heads, KEY_WIDTH * VALUE_WIDTH)
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns_k = k0 + tl.arange(0, BLOCK_K)
        q = tiles.load_rows(query, rows, left, columns_k, KEY_WIDTH)
        k = tiles.load_rows(key, rows, left, columns_k, KEY_WIDTH)
        s = tiles.load_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
        acc = tiles.dot(q, s, acc, PRECISION)
        scores = tiles.dot(q, tl.trans(k), scores, PRECISION)
    beta = locate.at(beta, row, token, head)
    b = tiles.load_numbers(beta, rows, left)
    if sums is not None:
        sums = locate.at(sums, row, token, head)
        own = tiles.load_pairs(sums.data, rows, left)
        acc *= entering_decay(own)[:, None]
        scores *= decay_between(own)
    scores = tl.where(rows[:, None] >= rows[None, :], scores * b[None, :], 0.0)
    errors += locate.dense_offset(row, token, seqs.length, head, heads, VALUE_WIDTH)
    e = tiles.load(errors, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
    acc = tiles.dot(scores, e, acc, PRECISION)
    output += locate.dense_offset(row, token, seqs.length, query_at, heads * QUERIES, VALUE_WIDTH)
    tiles.store(
        output, heads * QUERIES * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, acc * scale
    )


@triton.jit
def chunk_d_written(
    query, key, d_output, sums, d_written, seqs, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du from the outputs of the chunk; grid: (chunks * blocks of V, Hkv)."""
    _, block, head, _, row, token, left, _, _ = locate.chunk(seqs, VALUE_WIDTH, BLOCK_V, CHUNK)
    if left <= 0:
        return
    rows, columns_v = tl.arange(0, CHUNK), block * BLOCK_V + tl.arange(0, BLOCK_V)
    query = locate.at(query, row, token, head * QUERIES)
    d_output = locate.at(d_output, row, token, head * QUERIES)
    key = locate.at(key, row, token, head)
    if sums is not None:
        sums = locate.at(sums, row, token, head)
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for r in range(0, QUERIES):
        query_at = locate.skip_heads(query, r)
        scores = tiles.products(  # [key token, query token]
            key, left, query_at, left, rows, KEY_WIDTH, BLOCK_K, PRECISION
        )
        if sums is not None:
            scores *= decay_between(tiles.load_pairs(sums.data, rows, left))
        scores = tl.where(rows[:, None] <= rows[None, :], scores * scale, 0.0)
        base = locate.skip_heads(d_output, r)
        do = tiles.load_rows(base, rows, left, columns_v, VALUE_WIDTH)
        acc = tiles.dot(scores, do, acc, PRECISION)
    d_written += locate.dense_offset(row, token, seqs.length, head, heads, VALUE_WIDTH)
    kept = tiles.narrow(acc, PRECISION)
    tiles.store(d_written, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, kept)
