"""Triton kernels of linear attention's gradients, one for each of dq, dk and dv.

A kernel for all of them at once spills registers from heads of 128 on; these do not. Legend as in
triton_forward; inverse and delta as in triton_backward_states.
"""

import triton
import triton.language as tl

from supra.kernels.tiles import (
    dot,
    load_pairs,
    load_tile,
    offset,
    sequence,
    sequence_of,
    store_tile,
)


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
    across: tl.constexpr = (KEY_WIDTH + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = CHUNK // TILE
    tile, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    chunk, part = tile // tiles, tile % tiles
    n = sequence_of(chunk, chunk_offsets, sequences, length, CHUNK, PACKED)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)
    chunk_at = (chunk - first) * CHUNK
    left = tokens - chunk_at
    if part * TILE >= left:
        return
    rows = tl.arange(0, TILE)
    columns_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    state_head = head // QUERIES
    kv_head = state_head // STATES
    token = begin + chunk_at

    d_output += offset(row, d_batch, token + part * TILE, d_time, head, d_head)
    key += offset(row, key_batch, token, key_time, kv_head, key_head)
    value += offset(row, value_batch, token, value_time, kv_head, value_head)
    slot = tl.cast(chunk + n, tl.int64) * (heads // QUERIES) + state_head
    states += slot * KEY_WIDTH * VALUE_WIDTH
    acc = tl.zeros([TILE, BLOCK_K], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns_v = v0 + tl.arange(0, BLOCK_V)
        do = load_tile(d_output, d_time, rows, left - part * TILE, columns_v, VALUE_WIDTH)
        s = load_tile(states, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
        acc = dot(do, tl.trans(s), acc, PRECISION)
    if NORMALIZED:
        factors += offset(row, length, token + part * TILE, 1, head, total) * 2
        inverse, delta = load_pairs(factors, rows, left - part * TILE)
        base = normalizers + slot * KEY_WIDTH
        z = tl.load(base + columns_k, mask=columns_k < KEY_WIDTH, other=0.0)
        acc += delta[:, None] * z[None, :]
    if HAS_DECAY:
        sums += offset(row, sums_batch, token, sums_time, state_head, sums_head)
        base = sums + part * TILE * 2
        high, low = load_pairs(base, rows, left - part * TILE)
        acc *= tl.exp(high + low)[:, None]

    for j in range(0, part + 1):
        d_scores = tl.zeros([TILE, TILE], tl.float32)
        for v0 in range(0, VALUE_WIDTH, BLOCK_V):
            columns_v = v0 + tl.arange(0, BLOCK_V)
            do = load_tile(d_output, d_time, rows, left - part * TILE, columns_v, VALUE_WIDTH)
            v = load_tile(
                value + j * TILE * value_time,
                value_time, rows, left - j * TILE, columns_v, VALUE_WIDTH,
            )  # fmt: skip
            d_scores = dot(do, tl.trans(v), d_scores, PRECISION)
        if NORMALIZED:
            d_scores += delta[:, None]
        past = (part * TILE + rows)[:, None] >= (j * TILE + rows)[None, :]
        if HAS_DECAY:
            base = sums + j * TILE * 2
            high_j, low_j = load_pairs(base, rows, left - j * TILE)
            logs = (high[:, None] - high_j[None, :]) + (low[:, None] - low_j[None, :])
            d_scores *= tl.exp(tl.where(past, logs, float("-inf")))
        else:
            d_scores = tl.where(past, d_scores, 0.0)
        k = load_tile(
            key + j * TILE * key_time, key_time, rows, left - j * TILE, columns_k, KEY_WIDTH
        )
        acc = dot(d_scores, k, acc, PRECISION)

    if NORMALIZED:
        acc *= inverse[:, None]
    else:
        acc *= scale
    token += part * TILE
    base = d_query + (row * tl.cast(length, tl.int64) + token) * heads * KEY_WIDTH
    store_tile(
        base + head * KEY_WIDTH, heads * KEY_WIDTH, rows, left - part * TILE,
        columns_k, KEY_WIDTH, acc,
    )  # fmt: skip
    if HAS_DECAY:
        query += offset(row, query_batch, token, query_time, head, query_head)
        q = load_tile(query, query_time, rows, left - part * TILE, columns_k, KEY_WIDTH)
        base = query_products + offset(row, length, token, 1, block * heads + head, total)
        along = tl.sum(q.to(tl.float32) * acc, 1)
        tl.store(base + rows, along, mask=rows < left - part * TILE)


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

    grid: (chunks * CHUNK / TILE * blocks of K, Hkv). Transposed scores come from a product of their
    own: a transposed accumulator as an operand is miscompiled by some versions on sm_90.
    """
    across: tl.constexpr = (KEY_WIDTH + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = CHUNK // TILE
    tile, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    chunk, part = tile // tiles, tile % tiles
    n = sequence_of(chunk, chunk_offsets, sequences, length, CHUNK, PACKED)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)
    chunk_at = (chunk - first) * CHUNK
    left = tokens - chunk_at
    if part * TILE >= left:
        return
    rows = tl.arange(0, TILE)
    columns_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    token = begin + chunk_at
    value += offset(row, value_batch, token + part * TILE, value_time, head, value_head)
    key += offset(row, key_batch, token + part * TILE, key_time, head, key_head)
    query += offset(row, query_batch, token, query_time, 0, query_head)
    d_output += offset(row, d_batch, token, d_time, 0, d_head)
    if NORMALIZED:
        factors += offset(row, length, token, 1, 0, total) * 2
    all_states = tl.zeros([TILE, BLOCK_K], tl.float32)

    for s in range(0, STATES):
        state_head = head * STATES + s
        slot = tl.cast(chunk, tl.int64) * (heads * STATES) + state_head
        acc = tl.zeros([TILE, BLOCK_K], tl.float32)
        for v0 in range(0, VALUE_WIDTH, BLOCK_V):
            columns_v = v0 + tl.arange(0, BLOCK_V)
            v = load_tile(value, value_time, rows, left - part * TILE, columns_v, VALUE_WIDTH)
            ds = load_tile(
                d_states + slot * KEY_WIDTH * VALUE_WIDTH,
                VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH,
            )  # fmt: skip
            acc = dot(v, tl.trans(ds), acc, PRECISION)
        if NORMALIZED:
            base = d_normalizers + slot * KEY_WIDTH
            acc += tl.load(base + columns_k, mask=columns_k < KEY_WIDTH, other=0.0)[None, :]
        if HAS_DECAY:
            sums_s = sums + offset(row, sums_batch, token, sums_time, state_head, sums_head)
            base = sums_s + part * TILE * 2
            high, low = load_pairs(base, rows, left - part * TILE)
            last = sums_s + tl.minimum(left, CHUNK) * 2 - 2
            whole_high, whole_low = tl.load(last), tl.load(last + 1)
            acc *= tl.exp((whole_high - high) + (whole_low - low))[:, None]
        for r in range(0, QUERIES):
            query_at = query + (state_head * QUERIES + r) * tl.cast(query_head, tl.int64)
            d_at = d_output + (state_head * QUERIES + r) * tl.cast(d_head, tl.int64)
            for i in range(part, tiles):
                d_scores = tl.zeros([TILE, TILE], tl.float32)  # [key token, query token]
                for v0 in range(0, VALUE_WIDTH, BLOCK_V):
                    columns_v = v0 + tl.arange(0, BLOCK_V)
                    v = load_tile(
                        value, value_time, rows, left - part * TILE, columns_v, VALUE_WIDTH
                    )
                    do = load_tile(
                        d_at + i * TILE * d_time,
                        d_time, rows, left - i * TILE, columns_v, VALUE_WIDTH,
                    )  # fmt: skip
                    d_scores = dot(v, tl.trans(do), d_scores, PRECISION)
                if NORMALIZED:
                    base = factors + ((state_head * QUERIES + r) * tl.cast(total, tl.int64)) * 2
                    inverse, delta = load_pairs(base + i * TILE * 2, rows, left - i * TILE)
                    d_scores = (d_scores + delta[None, :]) * inverse[None, :]
                else:
                    d_scores *= scale
                future = (part * TILE + rows)[:, None] <= (i * TILE + rows)[None, :]
                future &= (rows < left - i * TILE)[None, :]
                if HAS_DECAY:
                    base = sums_s + i * TILE * 2
                    high_i, low_i = load_pairs(base, rows, left - i * TILE)
                    logs = (high_i[None, :] - high[:, None]) + (low_i[None, :] - low[:, None])
                    d_scores *= tl.exp(tl.where(future, logs, float("-inf")))
                else:
                    d_scores = tl.where(future, d_scores, 0.0)
                q = load_tile(
                    query_at + i * TILE * query_time,
                    query_time, rows, left - i * TILE, columns_k, KEY_WIDTH,
                )  # fmt: skip
                acc = dot(d_scores, q, acc, PRECISION)
        if HAS_DECAY:
            k = load_tile(key, key_time, rows, left - part * TILE, columns_k, KEY_WIDTH)
            base = key_products + offset(
                row, length, token + part * TILE, 1, block * heads * STATES + state_head, total
            )
            along = tl.sum(k.to(tl.float32) * acc, 1)
            tl.store(base + rows, along, mask=rows < left - part * TILE)
        all_states += acc

    base = d_key + (row * tl.cast(length, tl.int64) + token + part * TILE) * heads * KEY_WIDTH
    store_tile(
        base + head * KEY_WIDTH, heads * KEY_WIDTH, rows, left - part * TILE,
        columns_k, KEY_WIDTH, all_states,
    )  # fmt: skip


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
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    tiles: tl.constexpr = CHUNK // TILE
    tile, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    chunk, part = tile // tiles, tile % tiles
    n = sequence_of(chunk, chunk_offsets, sequences, length, CHUNK, PACKED)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)
    chunk_at = (chunk - first) * CHUNK
    left = tokens - chunk_at
    if part * TILE >= left:
        return
    rows = tl.arange(0, TILE)
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    token = begin + chunk_at
    key += offset(row, key_batch, token + part * TILE, key_time, head, key_head)
    query += offset(row, query_batch, token, query_time, 0, query_head)
    d_output += offset(row, d_batch, token, d_time, 0, d_head)
    if NORMALIZED:
        factors += offset(row, length, token, 1, 0, total) * 2
    acc = tl.zeros([TILE, BLOCK_V], tl.float32)

    for s in range(0, STATES):
        state_head = head * STATES + s
        slot = tl.cast(chunk, tl.int64) * (heads * STATES) + state_head
        carried = tl.zeros([TILE, BLOCK_V], tl.float32)
        for k0 in range(0, KEY_WIDTH, BLOCK_K):
            columns_k = k0 + tl.arange(0, BLOCK_K)
            k = load_tile(key, key_time, rows, left - part * TILE, columns_k, KEY_WIDTH)
            ds = load_tile(
                d_states + slot * KEY_WIDTH * VALUE_WIDTH,
                VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH,
            )  # fmt: skip
            carried = dot(k, ds, carried, PRECISION)
        if HAS_DECAY:
            sums_s = sums + offset(row, sums_batch, token, sums_time, state_head, sums_head)
            base = sums_s + part * TILE * 2
            high, low = load_pairs(base, rows, left - part * TILE)
            last = sums_s + tl.minimum(left, CHUNK) * 2 - 2
            whole_high, whole_low = tl.load(last), tl.load(last + 1)
            carried *= tl.exp((whole_high - high) + (whole_low - low))[:, None]
        acc += carried
        for r in range(0, QUERIES):
            query_at = query + (state_head * QUERIES + r) * tl.cast(query_head, tl.int64)
            d_at = d_output + (state_head * QUERIES + r) * tl.cast(d_head, tl.int64)
            for i in range(part, tiles):
                scores = tl.zeros([TILE, TILE], tl.float32)  # [key token, query token]
                for k0 in range(0, KEY_WIDTH, BLOCK_K):
                    columns_k = k0 + tl.arange(0, BLOCK_K)
                    k = load_tile(key, key_time, rows, left - part * TILE, columns_k, KEY_WIDTH)
                    q = load_tile(
                        query_at + i * TILE * query_time,
                        query_time, rows, left - i * TILE, columns_k, KEY_WIDTH,
                    )  # fmt: skip
                    scores = dot(k, tl.trans(q), scores, PRECISION)
                if NORMALIZED:
                    base = factors + ((state_head * QUERIES + r) * tl.cast(total, tl.int64)) * 2
                    inverse, _ = load_pairs(base + i * TILE * 2, rows, left - i * TILE)
                    scores *= inverse[None, :]
                else:
                    scores *= scale
                future = (part * TILE + rows)[:, None] <= (i * TILE + rows)[None, :]
                future &= (rows < left - i * TILE)[None, :]
                if HAS_DECAY:
                    base = sums_s + i * TILE * 2
                    high_i, low_i = load_pairs(base, rows, left - i * TILE)
                    logs = (high_i[None, :] - high[:, None]) + (low_i[None, :] - low[:, None])
                    scores *= tl.exp(tl.where(future, logs, float("-inf")))
                else:
                    scores = tl.where(future, scores, 0.0)
                do = load_tile(
                    d_at + i * TILE * d_time,
                    d_time, rows, left - i * TILE, columns_v, VALUE_WIDTH,
                )  # fmt: skip
                acc = dot(scores, do, acc, PRECISION)

    base = d_value + (row * tl.cast(length, tl.int64) + token + part * TILE) * heads * VALUE_WIDTH
    store_tile(
        base + head * VALUE_WIDTH, heads * VALUE_WIDTH, rows, left - part * TILE,
        columns_v, VALUE_WIDTH, acc,
    )  # fmt: skip
