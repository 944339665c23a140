"""Triton kernels of the gradients of queries, keys and decay; legend as in delta_backward.py.

The gradient of G_i is the sum of x_ij over its row less that over its column, with x_ij = y dy for
every product y that D_ij scales. Both sums are taken of the same numbers: row sums as q . dq and
column sums as v . dv, which agree but for their rounding, would lose what is left of them where the
decay is strong.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.decay import decay_between, entering_decay, last_pair, leaving_decay
from supra.kernels.launch import Rows


@triton.jit
def chunk_d_overlap(
    query, key, beta, d_output, sums, errors, d_value, d_overlap, key_products, seqs, heads, total,
    scale, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of k . k with its transpose added, laid out as T.

    grid: (chunks, Hkv). key_products, block 0: the part of -dG that stays within the chunk.
    """
    _, _, head, _, row, token, left, _, _ = locate.chunk(seqs, 1, 1, CHUNK)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    i, j = rows[:, None], rows[None, :]
    key = locate.at(key, row, token, head)
    place = locate.dense_offset(row, token, seqs.length, head, heads, VALUE_WIDTH)
    errors += place
    below, above = _d_inverse(
        d_value + place, errors, rows, left, heads, VALUE_WIDTH, BLOCK_V, PRECISION
    )
    beta = locate.at(beta, row, token, head)
    b = tiles.load_numbers(beta, rows, left)
    if sums is not None:
        sums = locate.at(sums, row, token, head)
        own = tiles.load_pairs(sums.data, rows, left)
        decay = decay_between(own)
        below, above = below * decay, above * decay
    below = tl.where(i > j, below * b[None, :], 0.0)
    above = tl.where(i < j, above, 0.0)
    base = d_overlap + locate.dense_offset(row, token, seqs.length, head, heads, CHUNK)
    found = tiles.narrow(below + above * b[:, None], PRECISION)
    tiles.store(base, heads * CHUNK, rows, left, rows, CHUNK, found)

    if sums is not None:
        overlap = tiles.products(key, left, key, left, rows, KEY_WIDTH, BLOCK_K, PRECISION)
        d_sums = b * tl.sum(above * overlap, 1) - tl.sum(below * overlap, 1)
        for r in range(0, QUERIES):
            query_lane = head * QUERIES + r
            query_at = locate.at(query, row, token, query_lane)
            d_at = locate.at(d_output, row, token, query_lane)
            scores = tiles.products(query_at, left, key, left, rows, KEY_WIDTH, BLOCK_K, PRECISION)
            d_scores = tiles.products(
                d_at, left, Rows(errors, 0, heads * VALUE_WIDTH, 0), left, rows,
                VALUE_WIDTH, BLOCK_V, PRECISION,
            )  # fmt: skip
            scores *= d_scores * decay_between(own) * (b * scale)[None, :]
            scores = tl.where(i > j, scores, 0.0)
            d_sums += tl.sum(scores, 1) - tl.sum(scores, 0)
        base = key_products + locate.lane_offset(head, total, row, token, seqs.length)
        tiles.store_vector(base, rows, left, -d_sums)


@triton.jit
def _d_inverse(
    d_value, errors, rows, left, heads,
    VALUE_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv_i . e_j and e_i . dv_j: the transpose is a product of its own, not of an accumulator."""
    found = tl.zeros([rows.shape[0], rows.shape[0]], tl.float32)
    transposed = tl.zeros([rows.shape[0], rows.shape[0]], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns = v0 + tl.arange(0, BLOCK_V)
        dv = tiles.load(d_value, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
        e = tiles.load(errors, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
        found = tiles.dot(dv, tl.trans(e), found, PRECISION)
        transposed = tiles.dot(e, tl.trans(dv), transposed, PRECISION)
    return found, transposed


@triton.jit
def chunk_d_query(
    query, key, beta, d_output, sums, errors, states, d_query, query_products, seqs, heads, total,
    scale, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and the part of q . dq that comes through the state, [blocks, Hq, B * T].

    grid: (chunks * blocks of K, Hq).
    """
    chunk, block, query_at, n, row, token, left, _, _ = locate.chunk(
        seqs, KEY_WIDTH, BLOCK_K, CHUNK
    )
    head = query_at // QUERIES
    if left <= 0:
        return
    rows, columns_k = tl.arange(0, CHUNK), block * BLOCK_K + tl.arange(0, BLOCK_K)
    d_output = locate.at(d_output, row, token, query_at)
    errors += locate.dense_offset(row, token, seqs.length, head, heads, VALUE_WIDTH)
    states += locate.slot_offset(chunk + n, head, heads, KEY_WIDTH * VALUE_WIDTH)
    acc = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns_v = v0 + tl.arange(0, BLOCK_V)
        do = tiles.load_rows(d_output, rows, left, columns_v, VALUE_WIDTH)
        s = tiles.load_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
        acc = tiles.dot(do, tl.trans(s), acc, PRECISION)
        e = tiles.load(errors, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        d_scores = tiles.dot(do, tl.trans(e), d_scores, PRECISION)
    acc *= scale
    if sums is not None:
        sums = locate.at(sums, row, token, head)
        own = tiles.load_pairs(sums.data, rows, left)
        acc *= entering_decay(own)[:, None]
        d_scores *= decay_between(own)
        query = locate.at(query, row, token, query_at)
        q = tiles.load_rows(query, rows, left, columns_k, KEY_WIDTH)
        lane = block * heads * QUERIES + query_at
        base = query_products + locate.lane_offset(lane, total, row, token, seqs.length)
        places = base + rows  # made after the sum, they take 16 more registers on sm_100
        tl.store(places, tl.sum(q.to(tl.float32) * acc, 1), mask=rows < left)

    beta = locate.at(beta, row, token, head)
    b = tiles.load_numbers(beta, rows, left)
    d_scores = tl.where(rows[:, None] >= rows[None, :], d_scores * (b * scale)[None, :], 0.0)
    key = locate.at(key, row, token, head)
    k = tiles.load_rows(key, rows, left, columns_k, KEY_WIDTH)
    acc = tiles.dot(d_scores, k, acc, PRECISION)
    d_query += locate.dense_offset(row, token, seqs.length, query_at, heads * QUERIES, KEY_WIDTH)
    tiles.store(d_query, heads * QUERIES * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH, acc)


@triton.jit
def chunk_d_key(
    query, key, beta, d_output, sums, errors, states, d_states, d_value, d_overlap, d_key,
    key_products, carried, seqs, heads, total, chunks, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk; grid: (chunks * blocks of K, Hkv).

    key_products [blocks, Hkv, B * T]: the part of -dG through the states before and after the
    chunk, added to what chunk_d_overlap left in block 0; carried [blocks, Hkv, chunks]: <S, dS>
    after the chunk, the gradient of the sum of all its logs.
    """
    chunk, block, head, n, row, token, left, _, _ = locate.chunk(seqs, KEY_WIDTH, BLOCK_K, CHUNK)
    if left <= 0:
        return
    rows, columns_k = tl.arange(0, CHUNK), block * BLOCK_K + tl.arange(0, BLOCK_K)
    key = locate.at(key, row, token, head)
    place = locate.dense_offset(row, token, seqs.length, head, heads, VALUE_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += locate.slot_offset(chunk + n, head, heads, state_size)
    d_states += locate.slot_offset(chunk, head, heads, state_size)
    dv_at, e_at = d_value + place, errors + place
    read, acc, along = _through_states(
        dv_at, e_at, states, d_states, rows, left, heads, columns_k,
        KEY_WIDTH, VALUE_WIDTH, BLOCK_V, sums is not None, PRECISION,
    )  # fmt: skip
    beta = locate.at(beta, row, token, head)
    b = tiles.load_numbers(beta, rows, left)
    k = tiles.load_rows(key, rows, left, columns_k, KEY_WIDTH)
    acc *= b[:, None]
    if sums is not None:
        sums = locate.at(sums, row, token, head)
        own, last = tiles.load_pairs(sums.data, rows, left), last_pair(sums, left, CHUNK)
        read *= entering_decay(own)[:, None]
        acc *= leaving_decay(own, last)[:, None]
        leaving = k.to(tl.float32) * acc
        along_k = tl.sum(leaving + k.to(tl.float32) * read, 1)
        base = key_products + locate.lane_offset(
            block * heads + head, total, row, token, seqs.length
        )
        along_k += tl.load(base + rows, mask=(rows < left) & (block == 0), other=0.0)
        tiles.store_vector(base, rows, left, along_k)
        carried += (block * heads + head) * tl.cast(chunks, tl.int64) + chunk
        tl.store(carried, tl.sum(leaving) + entering_decay(last) * tl.sum(along, 0))

    d_overlap += locate.dense_offset(row, token, seqs.length, head, heads, CHUNK)
    x = tiles.load(d_overlap, heads * CHUNK, rows, left, rows, CHUNK)
    acc = tiles.dot(x, -k, acc - read, PRECISION)
    for r in range(0, QUERIES):
        query_lane = head * QUERIES + r
        d_at = locate.at(d_output, row, token, query_lane)
        d_scores = tiles.products(  # [key token, query token]
            Rows(e_at, 0, heads * VALUE_WIDTH, 0), left, d_at, left, rows,
            VALUE_WIDTH, BLOCK_V, PRECISION,
        )  # fmt: skip
        if sums is not None:
            d_scores *= decay_between(own)
        d_scores = tl.where(rows[:, None] <= rows[None, :], d_scores * (b * scale)[:, None], 0.0)
        q_at = locate.at(query, row, token, query_lane)
        q = tiles.load_rows(q_at, rows, left, columns_k, KEY_WIDTH)
        acc = tiles.dot(d_scores, q, acc, PRECISION)
    d_key += locate.dense_offset(row, token, seqs.length, head, heads, KEY_WIDTH)
    tiles.store(d_key, heads * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH, acc)


@triton.jit
def _through_states(
    d_value, errors, states, d_states, rows, left, heads, columns_k,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv S^T, e dS^T [rows, columns_k], and with decay the sums of S dS over V [columns_k]."""
    read = tl.zeros([rows.shape[0], columns_k.shape[0]], tl.float32)
    written = tl.zeros([rows.shape[0], columns_k.shape[0]], tl.float32)
    along = tl.zeros([columns_k.shape[0]], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns_v = v0 + tl.arange(0, BLOCK_V)
        dv = tiles.load(d_value, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        s = tiles.load_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
        read = tiles.dot(dv, tl.trans(s), read, PRECISION)
        e = tiles.load(errors, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        ds = tiles.load_state(d_states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
        written = tiles.dot(e, tl.trans(ds), written, PRECISION)
        if HAS_DECAY:
            along += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
    return read, written, along
