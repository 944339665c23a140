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
    key, value, query, d_output, sums, factors, states, normalizers, d_query, query_products, seqs,
    heads, total, scale, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr,
    STATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and the products q . dq of every block of channels [blocks, Hq, B * T]; heads = Hq.

    grid: (chunks * CHUNK / TILE * blocks of K, Hq).
    """
    chunk, part, at, block, head, n, row, token, left, _, _ = locate.tile(
        seqs, KEY_WIDTH, BLOCK_K, CHUNK, TILE
    )
    if at >= left:
        return
    rows, columns_k = tl.arange(0, TILE), block * BLOCK_K + tl.arange(0, BLOCK_K)
    state_head, kv_head = head // QUERIES, head // (QUERIES * STATES)
    d_output = locate.at(d_output, row, token + at, head)
    key = locate.at(key, row, token, kv_head)
    value = locate.at(value, row, token, kv_head)
    slot = locate.slot_offset(chunk + n, state_head, heads // QUERIES, 1)
    states += slot * (KEY_WIDTH * VALUE_WIDTH)
    acc = tiles.state_products(
        d_output, left - at, states, rows, columns_k, KEY_WIDTH, VALUE_WIDTH, BLOCK_V, PRECISION
    )
    if factors is not None:
        factors += locate.lane_offset(head, total, row, token + at, seqs.length) * 2
        inverse, delta = tiles.load_pairs(factors, rows, left - at)
        z = tiles.load_vector(normalizers + slot * KEY_WIDTH, 1, columns_k, KEY_WIDTH)
        acc += delta[:, None] * z[None, :]
    own = 0.0
    if sums is not None:
        sums = locate.at(sums, row, token, state_head)
        own = tiles.load_pairs(sums.data + at * 2, rows, left - at)
        acc *= entering_decay(own)[:, None]

    for j in range(0, part + 1):
        t = j * TILE
        d_scores = tiles.products(
            d_output, left - at, locate.skip(value, t), left - t, rows,
            VALUE_WIDTH, BLOCK_V, PRECISION,
        )  # fmt: skip
        if factors is not None:
            d_scores += delta[:, None]
        past = (at + rows)[:, None] >= (t + rows)[None, :]
        d_scores = decayed(d_scores, past, own, sums, t, rows, left, True)
        k = tiles.load_rows(locate.skip(key, t), rows, left - t, columns_k, KEY_WIDTH)
        acc = tiles.dot(d_scores, k, acc, PRECISION)

    if factors is not None:
        acc *= inverse[:, None]
    else:
        acc *= scale
    base = d_query + locate.dense_offset(row, token, seqs.length, head, heads, KEY_WIDTH)
    tiles.store(base, heads * KEY_WIDTH, at + rows, left, columns_k, KEY_WIDTH, acc)
    if sums is not None:
        query = locate.at(query, row, token, head)
        q = tiles.load_rows(query, at + rows, left, columns_k, KEY_WIDTH)
        base = query_products + locate.lane_offset(
            block * heads + head, total, row, token, seqs.length
        )
        tiles.store_vector(base, at + rows, left, tl.sum(q.to(tl.float32) * acc, 1))


@triton.jit
def chunk_d_key(
    query, key, value, d_output, sums, factors, d_states, d_normalizers, d_key, key_products, seqs,
    heads, total, scale, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr,
    STATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, and the products k . dk per state head and block of channels; heads = Hkv.

    grid: (chunks * CHUNK / TILE * blocks of K, Hkv).
    """
    chunk, part, at, block, head, _, row, token, left, _, _ = locate.tile(
        seqs, KEY_WIDTH, BLOCK_K, CHUNK, TILE
    )
    if at >= left:
        return
    rows, columns_k = tl.arange(0, TILE), block * BLOCK_K + tl.arange(0, BLOCK_K)
    value = locate.at(value, row, token + at, head)
    key = locate.at(key, row, token, head)
    query = locate.at(query, row, token, 0)
    d_output = locate.at(d_output, row, token, 0)
    if factors is not None:
        factors += locate.lane_offset(0, total, row, token, seqs.length) * 2
    all_states = tl.zeros([TILE, BLOCK_K], tl.float32)

    for s in range(0, STATES):
        state_head = head * STATES + s
        slot = locate.slot_offset(chunk, state_head, heads * STATES, 1)
        acc = tiles.state_products(
            value, left - at, d_states + slot * (KEY_WIDTH * VALUE_WIDTH), rows,
            columns_k, KEY_WIDTH, VALUE_WIDTH, BLOCK_V, PRECISION,
        )  # fmt: skip
        if factors is not None:
            d_z = tiles.load_vector(d_normalizers + slot * KEY_WIDTH, 1, columns_k, KEY_WIDTH)
            acc += d_z[None, :]
        own, sums_s = 0.0, sums
        if sums is not None:
            sums_s = locate.at(sums, row, token, state_head)
            own = tiles.load_pairs(sums_s.data + at * 2, rows, left - at)
            acc *= leaving_decay(own, last_pair(sums_s, left, CHUNK))[:, None]
        acc = _add_queries(
            acc, value, d_output, query,
            sums_s, own, factors, state_head, rows, part, left, columns_k, total, scale,
            VALUE_WIDTH, KEY_WIDTH, BLOCK_V, CHUNK, QUERIES, True, PRECISION,
        )  # fmt: skip
        if sums is not None:
            k = tiles.load_rows(key, at + rows, left, columns_k, KEY_WIDTH)
            lane = block * heads * STATES + state_head
            base = key_products + locate.lane_offset(lane, total, row, token, seqs.length)
            tiles.store_vector(base, at + rows, left, tl.sum(k.to(tl.float32) * acc, 1))
        all_states += acc

    d_key += locate.dense_offset(row, token, seqs.length, 0, heads, KEY_WIDTH) + head * KEY_WIDTH
    tiles.store(d_key, heads * KEY_WIDTH, at + rows, left, columns_k, KEY_WIDTH, all_states)


@triton.jit
def chunk_d_value(
    query, key, d_output, sums, factors, d_states, d_value, seqs, heads, total, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv; heads = Hkv. grid: (chunks * CHUNK / TILE * blocks of V, Hkv)."""
    chunk, part, at, block, head, _, row, token, left, _, _ = locate.tile(
        seqs, VALUE_WIDTH, BLOCK_V, CHUNK, TILE
    )
    if at >= left:
        return
    rows, columns_v = tl.arange(0, TILE), block * BLOCK_V + tl.arange(0, BLOCK_V)
    key = locate.at(key, row, token + at, head)
    query = locate.at(query, row, token, 0)
    d_output = locate.at(d_output, row, token, 0)
    if factors is not None:
        factors += locate.lane_offset(0, total, row, token, seqs.length) * 2
    acc = tl.zeros([TILE, BLOCK_V], tl.float32)

    for s in range(0, STATES):
        state_head = head * STATES + s
        slot = locate.slot_offset(chunk, state_head, heads * STATES, KEY_WIDTH * VALUE_WIDTH)
        carried = tl.zeros([TILE, BLOCK_V], tl.float32)
        for k0 in range(0, KEY_WIDTH, BLOCK_K):
            columns_k = k0 + tl.arange(0, BLOCK_K)
            k = tiles.load_rows(key, rows, left - at, columns_k, KEY_WIDTH)
            ds = tiles.load_state(d_states + slot, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
            carried = tiles.dot(k, ds, carried, PRECISION)
        own, sums_s = 0.0, sums
        if sums is not None:
            sums_s = locate.at(sums, row, token, state_head)
            own = tiles.load_pairs(sums_s.data + at * 2, rows, left - at)
            carried *= leaving_decay(own, last_pair(sums_s, left, CHUNK))[:, None]
        acc += carried
        acc = _add_queries(
            acc, key, query, d_output, sums_s, own, factors, state_head, rows, part, left,
            columns_v, total, scale, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, CHUNK, QUERIES, False,
            PRECISION,
        )  # fmt: skip

    # the head apart, here and in dk: within the offset it takes up to 24 more registers
    d_value += (
        locate.dense_offset(row, token, seqs.length, 0, heads, VALUE_WIDTH) + head * VALUE_WIDTH
    )
    tiles.store(d_value, heads * VALUE_WIDTH, at + rows, left, columns_v, VALUE_WIDTH, acc)


@triton.jit
def _add_queries(
    acc, x, y, z, sums, own, factors, state_head, rows, part, left, columns, total, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    QUERIES: tl.constexpr, HAS_DELTA: tl.constexpr, PRECISION: tl.constexpr,
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
        y_at = locate.skip_heads(y, head)
        z_at = locate.skip_heads(z, head)
        for i in range(part, CHUNK // TILE):
            t = i * TILE
            scores = tiles.products(  # [key token, query token]
                x, left - at, locate.skip(y_at, t), left - t, rows,
                WIDTH, BLOCK, PRECISION,
            )  # fmt: skip
            if factors is not None:
                base = factors + (head * tl.cast(total, tl.int64) + t) * 2
                inverse, delta = tiles.load_pairs(base, rows, left - t)
                if HAS_DELTA:
                    scores += delta[None, :]
                scores *= inverse[None, :]
            else:
                scores *= scale
            future = (at + rows)[:, None] <= (t + rows)[None, :]
            future &= (rows < left - t)[None, :]
            scores = decayed(scores, future, own, sums, t, rows, left, False)
            tile = tiles.load_rows(locate.skip(z_at, t), rows, left - t, columns, COLUMNS)
            acc = tiles.dot(scores, tile, acc, PRECISION)
    return acc
