"""Triton kernels of linear attention's gradients, one for each of dq, dk and dv.

A kernel for all of them at once spills registers from heads of 128 on; these do not. Legend as in
triton_forward; inverse and delta as in triton_backward_states.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.decay import entering_decay, last_pair, leaving_decay
from supra.kernels.linear_attention.triton_forward import decayed


@triton.jit
def chunk_d_query(
    key, value, query, d_output, sums, factors, states, normalizers, d_query, query_products,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, d_batch, d_time, d_head,
    sums_batch, sums_time, sums_head, sequences, length, heads, total, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr,
    HAS_DECAY: tl.constexpr, NORMALIZED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and the products q . dq of every block of channels [blocks, Hq, B * T]; heads = Hq.

    grid: (chunks * CHUNK / TILE * blocks of K, Hq).
    """
    chunk, part, at, block, head, n, row, token, left, _, _ = locate.tile(
        cu_seqlens, chunk_offsets, sequences, length, KEY_WIDTH, BLOCK_K, CHUNK, TILE, PACKED
    )
    if at >= left:
        return
    rows, columns_k = tl.arange(0, TILE), block * BLOCK_K + tl.arange(0, BLOCK_K)
    state_head, kv_head = head // QUERIES, head // (QUERIES * STATES)
    d_output += locate.offset(row, d_batch, token + at, d_time, head, d_head)
    key += locate.offset(row, key_batch, token, key_time, kv_head, key_head)
    value += locate.offset(row, value_batch, token, value_time, kv_head, value_head)
    slot = locate.slot_offset(chunk + n, state_head, heads // QUERIES, 1)
    states += slot * (KEY_WIDTH * VALUE_WIDTH)
    acc = tiles.state_products(
        d_output, d_time, left - at, states, rows, columns_k,
        KEY_WIDTH, VALUE_WIDTH, BLOCK_V, PRECISION,
    )  # fmt: skip
    if NORMALIZED:
        factors += locate.offset(row, length, token + at, 1, head, total) * 2
        inverse, delta = tiles.load_pairs(factors, rows, left - at)
        z = tiles.load_vector(normalizers + slot * KEY_WIDTH, 1, columns_k, KEY_WIDTH)
        acc += delta[:, None] * z[None, :]
    own = 0.0
    if HAS_DECAY:
        sums += locate.offset(row, sums_batch, token, sums_time, state_head, sums_head)
        own = tiles.load_pairs(sums + at * 2, rows, left - at)
        acc *= entering_decay(own)[:, None]

    for j in range(0, part + 1):
        t = j * TILE
        d_scores = tiles.products(
            d_output, d_time, left - at, value + t * value_time, value_time, left - t, rows,
            VALUE_WIDTH, BLOCK_V, PRECISION,
        )  # fmt: skip
        if NORMALIZED:
            d_scores += delta[:, None]
        past = (at + rows)[:, None] >= (t + rows)[None, :]
        d_scores = decayed(d_scores, past, own, sums, t, rows, left, True, HAS_DECAY)
        k = tiles.load(key + t * key_time, key_time, rows, left - t, columns_k, KEY_WIDTH)
        acc = tiles.dot(d_scores, k, acc, PRECISION)

    if NORMALIZED:
        acc *= inverse[:, None]
    else:
        acc *= scale
    base = d_query + locate.dense_offset(row, token, length, head, heads, KEY_WIDTH)
    tiles.store(base, heads * KEY_WIDTH, at + rows, left, columns_k, KEY_WIDTH, acc)
    if HAS_DECAY:
        query += locate.offset(row, query_batch, token, query_time, head, query_head)
        q = tiles.load(query, query_time, at + rows, left, columns_k, KEY_WIDTH)
        base = query_products + locate.offset(row, length, token, 1, block * heads + head, total)
        tiles.store_vector(base, at + rows, left, tl.sum(q.to(tl.float32) * acc, 1))


@triton.jit
def chunk_d_key(
    query, key, value, d_output, sums, factors, d_states, d_normalizers, d_key, key_products,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, d_batch, d_time, d_head,
    sums_batch, sums_time, sums_head, sequences, length, heads, total, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr,
    HAS_DECAY: tl.constexpr, NORMALIZED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, and the products k . dk per state head and block of channels; heads = Hkv.

    grid: (chunks * CHUNK / TILE * blocks of K, Hkv).
    """
    chunk, part, at, block, head, _, row, token, left, _, _ = locate.tile(
        cu_seqlens, chunk_offsets, sequences, length, KEY_WIDTH, BLOCK_K, CHUNK, TILE, PACKED
    )
    if at >= left:
        return
    rows, columns_k = tl.arange(0, TILE), block * BLOCK_K + tl.arange(0, BLOCK_K)
    value += locate.offset(row, value_batch, token + at, value_time, head, value_head)
    key += locate.offset(row, key_batch, token, key_time, head, key_head)
    query += locate.offset(row, query_batch, token, query_time, 0, query_head)
    d_output += locate.offset(row, d_batch, token, d_time, 0, d_head)
    if NORMALIZED:
        factors += locate.offset(row, length, token, 1, 0, total) * 2
    all_states = tl.zeros([TILE, BLOCK_K], tl.float32)

    for s in range(0, STATES):
        state_head = head * STATES + s
        slot = locate.slot_offset(chunk, state_head, heads * STATES, 1)
        acc = tiles.state_products(
            value, value_time, left - at, d_states + slot * (KEY_WIDTH * VALUE_WIDTH), rows,
            columns_k, KEY_WIDTH, VALUE_WIDTH, BLOCK_V, PRECISION,
        )  # fmt: skip
        if NORMALIZED:
            d_z = tiles.load_vector(d_normalizers + slot * KEY_WIDTH, 1, columns_k, KEY_WIDTH)
            acc += d_z[None, :]
        own, sums_s = 0.0, sums
        if HAS_DECAY:
            sums_s += locate.offset(row, sums_batch, token, sums_time, state_head, sums_head)
            own = tiles.load_pairs(sums_s + at * 2, rows, left - at)
            acc *= leaving_decay(own, last_pair(sums_s, left, CHUNK))[:, None]
        acc = _add_queries(
            acc, value, value_time, d_output, d_time, d_head, query, query_time, query_head,
            sums_s, own, factors, state_head, rows, part, left, columns_k, total, scale,
            VALUE_WIDTH, KEY_WIDTH, BLOCK_V, CHUNK, QUERIES, True, HAS_DECAY, NORMALIZED, PRECISION,
        )  # fmt: skip
        if HAS_DECAY:
            k = tiles.load(key, key_time, at + rows, left, columns_k, KEY_WIDTH)
            lane = block * heads * STATES + state_head
            base = key_products + locate.offset(row, length, token, 1, lane, total)
            tiles.store_vector(base, at + rows, left, tl.sum(k.to(tl.float32) * acc, 1))
        all_states += acc

    d_key += locate.dense_offset(row, token, length, 0, heads, KEY_WIDTH) + head * KEY_WIDTH
    tiles.store(d_key, heads * KEY_WIDTH, at + rows, left, columns_k, KEY_WIDTH, all_states)


@triton.jit
def chunk_d_value(
    query, key, d_output, sums, factors, d_states, d_value, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    sums_batch, sums_time, sums_head, sequences, length, heads, total, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr,
    HAS_DECAY: tl.constexpr, NORMALIZED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv; heads = Hkv. grid: (chunks * CHUNK / TILE * blocks of V, Hkv)."""
    chunk, part, at, block, head, _, row, token, left, _, _ = locate.tile(
        cu_seqlens, chunk_offsets, sequences, length, VALUE_WIDTH, BLOCK_V, CHUNK, TILE, PACKED
    )
    if at >= left:
        return
    rows, columns_v = tl.arange(0, TILE), block * BLOCK_V + tl.arange(0, BLOCK_V)
    key += locate.offset(row, key_batch, token + at, key_time, head, key_head)
    query += locate.offset(row, query_batch, token, query_time, 0, query_head)
    d_output += locate.offset(row, d_batch, token, d_time, 0, d_head)
    if NORMALIZED:
        factors += locate.offset(row, length, token, 1, 0, total) * 2
    acc = tl.zeros([TILE, BLOCK_V], tl.float32)

    for s in range(0, STATES):
        state_head = head * STATES + s
        slot = locate.slot_offset(chunk, state_head, heads * STATES, KEY_WIDTH * VALUE_WIDTH)
        carried = tl.zeros([TILE, BLOCK_V], tl.float32)
        for k0 in range(0, KEY_WIDTH, BLOCK_K):
            columns_k = k0 + tl.arange(0, BLOCK_K)
            k = tiles.load(key, key_time, rows, left - at, columns_k, KEY_WIDTH)
            ds = tiles.load_state(d_states + slot, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
            carried = tiles.dot(k, ds, carried, PRECISION)
        own, sums_s = 0.0, sums
        if HAS_DECAY:
            sums_s += locate.offset(row, sums_batch, token, sums_time, state_head, sums_head)
            own = tiles.load_pairs(sums_s + at * 2, rows, left - at)
            carried *= leaving_decay(own, last_pair(sums_s, left, CHUNK))[:, None]
        acc += carried
        acc = _add_queries(
            acc, key, key_time, query, query_time, query_head, d_output, d_time, d_head,
            sums_s, own, factors, state_head, rows, part, left, columns_v, total, scale,
            KEY_WIDTH, VALUE_WIDTH, BLOCK_K, CHUNK, QUERIES, False, HAS_DECAY, NORMALIZED,
            PRECISION,
        )  # fmt: skip

    # the head apart, here and in dk: within the offset it takes up to 24 more registers
    d_value += locate.dense_offset(row, token, length, 0, heads, VALUE_WIDTH) + head * VALUE_WIDTH
    tiles.store(d_value, heads * VALUE_WIDTH, at + rows, left, columns_v, VALUE_WIDTH, acc)


@triton.jit
def _add_queries(
    acc, x, x_time, y, y_time, y_head, z, z_time, z_head,
    sums, own, factors, state_head, rows, part, left, columns, total, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    QUERIES: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORMALIZED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (x . y) z over the tokens of the chunk that read the tile, and all their queries.

    x: the tile's keys or values [rows, WIDTH]; y and z: queries and gradients of outputs, or the
    other way round. Transposed scores come from a product of their own: a transposed accumulator
    as an operand is miscompiled by some versions on sm_90.
    """
    TILE: tl.constexpr = rows.shape[0]
    at = part * TILE
    for r in range(0, QUERIES):
        head = state_head * QUERIES + r
        y_at = y + head * tl.cast(y_head, tl.int64)
        z_at = z + head * tl.cast(z_head, tl.int64)
        for i in range(part, CHUNK // TILE):
            t = i * TILE
            scores = tiles.products(  # [key token, query token]
                x, x_time, left - at, y_at + t * y_time, y_time, left - t, rows,
                WIDTH, BLOCK, PRECISION,
            )  # fmt: skip
            if NORMALIZED:
                base = factors + (head * tl.cast(total, tl.int64) + t) * 2
                inverse, delta = tiles.load_pairs(base, rows, left - t)
                if HAS_DELTA:
                    scores += delta[None, :]
                scores *= inverse[None, :]
            else:
                scores *= scale
            future = (at + rows)[:, None] <= (t + rows)[None, :]
            future &= (rows < left - t)[None, :]
            scores = decayed(scores, future, own, sums, t, rows, left, False, HAS_DECAY)
            tile = tiles.load(z_at + t * z_time, z_time, rows, left - t, columns, COLUMNS)
            acc = tiles.dot(scores, tile, acc, PRECISION)
    return acc
