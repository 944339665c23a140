"""Triton kernels of scores and outputs with a decay per key channel.

Legend: a chunk is one tile of TILE tokens; QUERIES = Hq / Hkv. The state before chunk c of sequence
n lies in slot c + n of `states`, so that each sequence has one slot more than chunks, for the state
after it. Scores are kept as [B, T, Hq, TILE], a row of its chunk for every token. What reads the
states as queries do is launched in their place.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.channel_decay import boundary_decay, crosses, entering_decay


@triton.jit
def pair_scores(
    query, key, sums, bonus, head, rows, left, KEY_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    LEVELS: tl.constexpr, HAS_BONUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of every row with the rows before it [rows, rows], and with itself [rows].

    A level computes the product of the whole tile, and keeps only its own blocks.
    """
    acc = tl.zeros([rows.shape[0], rows.shape[0]], tl.float32)
    own = tl.zeros([rows.shape[0]], tl.float32)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns = k0 + tl.arange(0, BLOCK_K)
        q = tiles.load_rows(query, rows, left, columns, KEY_WIDTH)
        k = tiles.load_rows(key, rows, left, columns, KEY_WIDTH)
        both = q.to(tl.float32) * k.to(tl.float32)
        if HAS_BONUS:
            both *= tiles.load_vector(bonus + head * KEY_WIDTH, 1, columns, KEY_WIDTH)[None, :]
        own += tl.sum(both, 1)
        for level in range(0, LEVELS):
            size = 1 << level
            decay = boundary_decay(sums, rows, left, columns, size, KEY_WIDTH, HAS_BONUS)
            found = tiles.dot(q * decay, tl.trans(k * decay), tl.zeros_like(acc), PRECISION)
            acc += tl.where(crosses(rows[:, None], rows[None, :], size), found, 0.0)
    return acc, own


@triton.jit
def chunk_scores(
    query, key, sums, bonus, scores, seqs, heads,
    KEY_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, QUERIES: tl.constexpr,
    LEVELS: tl.constexpr, HAS_BONUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the pairs of tokens in a chunk, zero in the future; heads = Hq.

    grid: (chunks, Hq).
    """
    _, _, head, _, row, token, left, _, _ = locate.chunk(seqs, 1, 1, TILE)
    if left <= 0:
        return
    rows = tl.arange(0, TILE)
    kv_heads, kv_head = heads // QUERIES, head // QUERIES
    query = locate.at(query, row, token, head)
    key = locate.at(key, row, token, kv_head)
    sums = locate.dense(sums, row, token, kv_head, kv_heads, seqs, KEY_WIDTH)
    acc, own = pair_scores(
        query, key, sums, bonus, head, rows, left, KEY_WIDTH, BLOCK_K, LEVELS, HAS_BONUS, PRECISION
    )
    acc += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
    base = scores + locate.dense_offset(row, token, seqs.length, head, heads, TILE)
    tiles.store(base, heads * TILE, rows, left, rows, TILE, tiles.narrow(acc, PRECISION))


@triton.jit
def chunk_output(
    query, value, sums, scores, states, output, seqs, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_BONUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output tiles [TILE, BLOCK_V]; heads = Hq. grid: (chunks * blocks of V, Hq)."""
    chunk, block, head, n, row, token, left, _, _ = locate.chunk(seqs, VALUE_WIDTH, BLOCK_V, TILE)
    if left <= 0:
        return
    rows, columns_v = tl.arange(0, TILE), block * BLOCK_V + tl.arange(0, BLOCK_V)
    kv_heads, kv_head = heads // QUERIES, head // QUERIES
    query = locate.at(query, row, token, head)
    value = locate.at(value, row, token, kv_head)
    sums = locate.dense(sums, row, token, kv_head, kv_heads, seqs, KEY_WIDTH)
    states += locate.slot_offset(chunk + n, kv_head, kv_heads, KEY_WIDTH * VALUE_WIDTH)

    acc = tl.zeros([TILE, BLOCK_V], tl.float32)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns = k0 + tl.arange(0, BLOCK_K)
        q = tiles.load_rows(query, rows, left, columns, KEY_WIDTH)
        q *= entering_decay(sums, rows, left, columns, KEY_WIDTH, HAS_BONUS)
        s = tiles.load_state(states, columns, columns_v, KEY_WIDTH, VALUE_WIDTH)
        acc = tiles.dot(q, s, acc, PRECISION)
    scores += locate.dense_offset(row, token, seqs.length, head, heads, TILE)
    a = tiles.load(scores, heads * TILE, rows, left, rows, TILE)
    v = tiles.load_rows(value, rows, left, columns_v, VALUE_WIDTH)
    acc = tiles.dot(a, v, acc, PRECISION) * scale
    output += locate.dense_offset(row, token, seqs.length, head, heads, VALUE_WIDTH)
    tiles.store(output, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, acc)
