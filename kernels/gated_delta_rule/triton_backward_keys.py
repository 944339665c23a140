"""Triton kernels of the gradients of queries, keys and decay; legend as in triton_backward.py.

The gradient of G_i is the sum of x_ij over its row less that over its column, with x_ij = y dy for
every product y that D_ij scales. Both sums are taken of the same numbers: row sums as q . dq and
column sums as v . dv, which agree but for their rounding, would lose what is left of them where the
decay is strong.
"""

import triton
import triton.language as tl

from supra.kernels.gated_delta_rule.triton_forward import decay_between, kept, locate
from supra.kernels.tiles import dot, load_pairs, load_tile, narrow, offset, store_tile


@triton.jit
def chunk_d_overlap(
    query, key, beta, d_output, sums, errors, d_value, d_overlap, key_products,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    beta_batch, beta_time, beta_head, sums_batch, sums_time, sums_head,
    sequences, length, heads, total, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of k . k with its transpose added, laid out as T.

    grid: (chunks, Hkv). key_products, block 0: the part of -dG that stays within the chunk.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    _, row, token, left = locate(chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    i, j = rows[:, None], rows[None, :]
    key += offset(row, key_batch, token, key_time, head, key_head)
    place = kept(row, token, length, head, heads, VALUE_WIDTH)
    products = tl.zeros([CHUNK, CHUNK], tl.float32)  # dv_i . e_j
    transposed = tl.zeros([CHUNK, CHUNK], tl.float32)  # e_i . dv_j
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns = v0 + tl.arange(0, BLOCK_V)
        dv = load_tile(d_value + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
        e = load_tile(errors + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
        products = dot(dv, tl.trans(e), products, PRECISION)
        transposed = dot(e, tl.trans(dv), transposed, PRECISION)
    beta += offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tl.load(beta + rows * beta_time, mask=rows < left, other=0.0)
    if HAS_DECAY:
        sums += offset(row, sums_batch, token, sums_time, head, sums_head)
        high, low = load_pairs(sums, rows, left)
        decay = decay_between(high, low)
        products *= decay
        transposed *= decay
    products = tl.where(i > j, products * b[None, :], 0.0)
    transposed = tl.where(i < j, transposed, 0.0)
    base = d_overlap + kept(row, token, length, head, heads, CHUNK)
    store_tile(
        base, heads * CHUNK, rows, left, rows, CHUNK,
        narrow(products + transposed * b[:, None], PRECISION),
    )  # fmt: skip

    if HAS_DECAY:
        overlap = tl.zeros([CHUNK, CHUNK], tl.float32)
        for k0 in range(0, KEY_WIDTH, BLOCK_K):
            columns = k0 + tl.arange(0, BLOCK_K)
            k = load_tile(key, key_time, rows, left, columns, KEY_WIDTH)
            overlap = dot(k, tl.trans(k), overlap, PRECISION)
        d_sums = b * tl.sum(transposed * overlap, 1) - tl.sum(products * overlap, 1)
        for r in range(0, QUERIES):
            query_at, query_lane = query, head * QUERIES + r
            query_at += offset(row, query_batch, token, query_time, query_lane, query_head)
            d_at = d_output + offset(row, d_batch, token, d_time, query_lane, d_head)
            scores = tl.zeros([CHUNK, CHUNK], tl.float32)
            d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
            for k0 in range(0, KEY_WIDTH, BLOCK_K):
                columns = k0 + tl.arange(0, BLOCK_K)
                q = load_tile(query_at, query_time, rows, left, columns, KEY_WIDTH)
                k = load_tile(key, key_time, rows, left, columns, KEY_WIDTH)
                scores = dot(q, tl.trans(k), scores, PRECISION)
            for v0 in range(0, VALUE_WIDTH, BLOCK_V):
                columns = v0 + tl.arange(0, BLOCK_V)
                do = load_tile(d_at, d_time, rows, left, columns, VALUE_WIDTH)
                e = load_tile(errors + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
                d_scores = dot(do, tl.trans(e), d_scores, PRECISION)
            scores *= d_scores * decay_between(high, low) * (b * scale)[None, :]
            scores = tl.where(i > j, scores, 0.0)
            d_sums += tl.sum(scores, 1) - tl.sum(scores, 0)
        base = key_products + offset(row, length, token, 1, head, total)
        tl.store(base + rows, -d_sums, mask=rows < left)


@triton.jit
def chunk_d_query(
    query, key, beta, d_output, sums, errors, states, d_query, query_products,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    beta_batch, beta_time, beta_head, sums_batch, sums_time, sums_head,
    sequences, length, heads, total, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and the part of q . dq that comes through the state, [blocks, Hq, B * T].

    grid: (chunks * blocks of K, Hq).
    """
    across: tl.constexpr = (KEY_WIDTH + BLOCK_K - 1) // BLOCK_K
    chunk, block, query_at = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    head = query_at // QUERIES
    n, row, token, left = locate(chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    columns_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    d_output += offset(row, d_batch, token, d_time, query_at, d_head)
    errors += kept(row, token, length, head, heads, VALUE_WIDTH)
    states += (tl.cast(chunk + n, tl.int64) * heads + head) * KEY_WIDTH * VALUE_WIDTH
    acc = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns_v = v0 + tl.arange(0, BLOCK_V)
        do = load_tile(d_output, d_time, rows, left, columns_v, VALUE_WIDTH)
        s = load_tile(states, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
        acc = dot(do, tl.trans(s), acc, PRECISION)
        e = load_tile(errors, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        d_scores = dot(do, tl.trans(e), d_scores, PRECISION)
    acc *= scale
    if HAS_DECAY:
        sums += offset(row, sums_batch, token, sums_time, head, sums_head)
        high, low = load_pairs(sums, rows, left)
        acc *= tl.exp(high + low)[:, None]
        d_scores *= decay_between(high, low)
        query += offset(row, query_batch, token, query_time, query_at, query_head)
        q = load_tile(query, query_time, rows, left, columns_k, KEY_WIDTH)
        lane = block * heads * QUERIES + query_at
        base = query_products + offset(row, length, token, 1, lane, total)
        tl.store(base + rows, tl.sum(q.to(tl.float32) * acc, 1), mask=rows < left)

    beta += offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tl.load(beta + rows * beta_time, mask=rows < left, other=0.0)
    d_scores = tl.where(rows[:, None] >= rows[None, :], d_scores * (b * scale)[None, :], 0.0)
    key += offset(row, key_batch, token, key_time, head, key_head)
    k = load_tile(key, key_time, rows, left, columns_k, KEY_WIDTH)
    acc = dot(d_scores, k, acc, PRECISION)
    d_query += kept(row, token, length, query_at, heads * QUERIES, KEY_WIDTH)
    store_tile(d_query, heads * QUERIES * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH, acc)


@triton.jit
def chunk_d_key(
    query, key, beta, d_output, sums, errors, states, d_states, d_value, d_overlap, d_key,
    key_products, carried, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    beta_batch, beta_time, beta_head, sums_batch, sums_time, sums_head,
    sequences, length, heads, total, chunks, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk; grid: (chunks * blocks of K, Hkv).

    key_products [blocks, Hkv, B * T]: the part of -dG through the states before and after the
    chunk, added to what chunk_d_overlap left in block 0; carried [blocks, Hkv, chunks]: <S, dS>
    after the chunk, the gradient of the sum of all its logs.
    """
    across: tl.constexpr = (KEY_WIDTH + BLOCK_K - 1) // BLOCK_K
    chunk, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    n, row, token, left = locate(chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    columns_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    key += offset(row, key_batch, token, key_time, head, key_head)
    place = kept(row, token, length, head, heads, VALUE_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += (tl.cast(chunk + n, tl.int64) * heads + head) * state_size
    d_states += (tl.cast(chunk, tl.int64) * heads + head) * state_size
    read = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    acc = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    along = tl.zeros([BLOCK_K], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns_v = v0 + tl.arange(0, BLOCK_V)
        dv = load_tile(d_value + place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        s = load_tile(states, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
        read = dot(dv, tl.trans(s), read, PRECISION)
        e = load_tile(errors + place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        ds = load_tile(d_states, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
        acc = dot(e, tl.trans(ds), acc, PRECISION)
        if HAS_DECAY:
            along += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
    beta += offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tl.load(beta + rows * beta_time, mask=rows < left, other=0.0)
    k = load_tile(key, key_time, rows, left, columns_k, KEY_WIDTH)
    acc *= b[:, None]
    if HAS_DECAY:
        sums += offset(row, sums_batch, token, sums_time, head, sums_head)
        high, low = load_pairs(sums, rows, left)
        last = sums + tl.minimum(left, CHUNK) * 2 - 2
        last_high, last_low = tl.load(last), tl.load(last + 1)
        read *= tl.exp(high + low)[:, None]
        acc *= tl.exp((last_high - high) + (last_low - low))[:, None]
        leaving = k.to(tl.float32) * acc
        products = tl.sum(leaving + k.to(tl.float32) * read, 1)
        base = key_products + offset(row, length, token, 1, block * heads + head, total)
        products += tl.load(base + rows, mask=(rows < left) & (block == 0), other=0.0)
        tl.store(base + rows, products, mask=rows < left)
        carried += offset(0, 0, chunk, 1, block * heads + head, chunks)
        tl.store(carried, tl.sum(leaving) + tl.exp(last_high + last_low) * tl.sum(along, 0))

    d_overlap += kept(row, token, length, head, heads, CHUNK)
    x = load_tile(d_overlap, heads * CHUNK, rows, left, rows, CHUNK)
    acc = dot(x, -k, acc - read, PRECISION)
    for r in range(0, QUERIES):
        query_lane = head * QUERIES + r
        d_at = d_output + offset(row, d_batch, token, d_time, query_lane, d_head)
        d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)  # [key token, query token]
        for v0 in range(0, VALUE_WIDTH, BLOCK_V):
            columns_v = v0 + tl.arange(0, BLOCK_V)
            do = load_tile(d_at, d_time, rows, left, columns_v, VALUE_WIDTH)
            e = load_tile(errors + place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
            d_scores = dot(e, tl.trans(do), d_scores, PRECISION)
        if HAS_DECAY:
            d_scores *= decay_between(high, low)
        d_scores = tl.where(rows[:, None] <= rows[None, :], d_scores * (b * scale)[:, None], 0.0)
        query_at = query + offset(row, query_batch, token, query_time, query_lane, query_head)
        q = load_tile(query_at, query_time, rows, left, columns_k, KEY_WIDTH)
        acc = dot(d_scores, q, acc, PRECISION)
    d_key += kept(row, token, length, head, heads, KEY_WIDTH)
    store_tile(d_key, heads * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH, acc)
