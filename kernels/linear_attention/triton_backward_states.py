"""Triton kernels of linear attention's gradients: those of the states, and the factors of outputs.

Legend as in triton_forward. With a normalizer the gradient of the undivided output is
d_output * inverse, and every product of d_output with a value has `delta` = -sum(d_output * output)
added, as if the values had a column of ones; both come from output_factors. Without one, inverse is
the scale.
"""

import triton
import triton.language as tl

from supra.kernels.tiles import (
    dot,
    load_pairs,
    load_tile,
    narrow,
    offset,
    sequence,
    store_pairs,
    store_tile,
)


@triton.jit
def output_factors(
    output, d_output, weights, factors, d_batch, d_time, d_head, length, heads, total, eps,
    VALUE_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """1 / (weights + eps) and -sum(d_output * output) of every row, [Hq, B * T, 2].

    grid: (B * T / TILE, Hq).
    """
    token = tl.program_id(0) * tl.cast(TILE, tl.int64) + tl.arange(0, TILE)
    head = tl.program_id(1)
    valid = token < total
    delta = tl.zeros([TILE], tl.float32)
    place = token * heads + head
    d_place = token // length * d_batch + token % length * d_time + head * tl.cast(d_head, tl.int64)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns = v0 + tl.arange(0, BLOCK_V)
        mask = valid[:, None] & (columns < VALUE_WIDTH)[None, :]
        o = tl.load(output + (place * VALUE_WIDTH)[:, None] + columns[None, :], mask=mask, other=0)
        do = tl.load(d_output + d_place[:, None] + columns[None, :], mask=mask, other=0)
        delta -= tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    inverse = 1 / (tl.load(weights + place, mask=valid, other=1.0) + eps)
    base = factors + head * tl.cast(total, tl.int64) * 2
    store_pairs(base, token, total, inverse, delta)


@triton.jit
def chunk_d_states(
    query, d_output, sums, factors, states, normalizers, d_end_memory, d_end_normalizer,
    d_states, d_normalizers, carried, d_memory, d_normalizer, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, d_batch, d_time, d_head,
    sums_batch, sums_time, sums_head, length, heads, total, chunks, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORMALIZED: tl.constexpr, HAS_END: tl.constexpr, HAS_END_NORMALIZER: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the state after every chunk, from the last chunk to the first; heads = Hs.

    grid: (N * Hs * blocks,). `carried` [blocks, Hs, chunks] gets <state, its gradient>, which is
    the gradient of the log of the chunk's whole decay.
    """
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = across * ((KEY_WIDTH + BLOCK_K - 1) // BLOCK_K)
    lane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, head = lane // heads, lane % heads
    columns_k = (block // across) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns_v = (block % across) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.arange(0, TILE)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)

    query += offset(row, query_batch, begin, query_time, head * QUERIES, query_head)
    d_output += offset(row, d_batch, begin, d_time, head * QUERIES, d_head)
    query_step, d_step = tl.cast(query_time, tl.int64), tl.cast(d_time, tl.int64)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    slot = tl.cast(first + n, tl.int64) * heads + head
    states += slot * state_size
    d_states += (tl.cast(first, tl.int64) * heads + head) * state_size
    state_step = tl.cast(heads, tl.int64) * state_size
    normalizer_step = tl.cast(heads, tl.int64) * KEY_WIDTH
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_END:
        base = d_end_memory + tl.cast(lane, tl.int64) * state_size
        acc = load_tile(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
    if NORMALIZED:
        normalizers += slot * KEY_WIDTH
        d_normalizers += (tl.cast(first, tl.int64) * heads + head) * KEY_WIDTH
        factors += offset(row, length, begin, 1, head * QUERIES, total) * 2
        d_z = tl.zeros([BLOCK_K], tl.float32)
        if HAS_END_NORMALIZER:
            base = d_end_normalizer + tl.cast(lane, tl.int64) * KEY_WIDTH
            d_z = tl.load(base + columns_k, mask=columns_k < KEY_WIDTH, other=0.0)
    if HAS_DECAY:
        sums += offset(row, sums_batch, begin, sums_time, head, sums_head)
        carried += offset(0, 0, first, 1, block * heads + head, chunks)

    count = tl.cdiv(tokens, CHUNK)
    for back in range(0, count):
        c = count - 1 - back
        store_tile(
            d_states + c * state_step, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH,
            narrow(acc, PRECISION),
        )  # fmt: skip
        if NORMALIZED and block % across == 0:
            base = d_normalizers + c * normalizer_step
            tl.store(base + columns_k, d_z, mask=columns_k < KEY_WIDTH)
        if HAS_DECAY:
            after = load_tile(
                states + (c + 1) * state_step,
                VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH,
            )  # fmt: skip
            along = tl.sum(after.to(tl.float32) * acc)
            if NORMALIZED and block % across == 0:
                base = normalizers + (c + 1) * normalizer_step
                z = tl.load(base + columns_k, mask=columns_k < KEY_WIDTH, other=0.0)
                along += tl.sum(z * d_z)
            tl.store(carried + c, along)
            sums_c = sums + c * CHUNK * tl.cast(sums_time, tl.int64)
            last = sums_c + tl.minimum(tokens - c * CHUNK, CHUNK) * 2 - 2
            whole = tl.exp(tl.load(last))
            acc *= whole
            if NORMALIZED:
                d_z *= whole
        for t in range(0, CHUNK, TILE):
            at = c * CHUNK + t
            if HAS_DECAY:
                high = tl.load(sums_c + (t + rows) * 2, mask=rows < tokens - at, other=0.0)
                entering = tl.exp(high)
            for r in range(0, QUERIES):
                q = load_tile(
                    query + at * query_step + r * tl.cast(query_head, tl.int64),
                    query_time, rows, tokens - at, columns_k, KEY_WIDTH,
                )  # fmt: skip
                do = load_tile(
                    d_output + at * d_step + r * tl.cast(d_head, tl.int64),
                    d_time, rows, tokens - at, columns_v, VALUE_WIDTH,
                )  # fmt: skip
                if HAS_DECAY:
                    q = q * entering[:, None]
                if NORMALIZED:
                    base = factors + (at + r * tl.cast(total, tl.int64)) * 2
                    inverse, delta = load_pairs(base, rows, tokens - at)
                    q = q * inverse[:, None]
                    d_z += tl.sum(q.to(tl.float32) * delta[:, None], 0)
                else:
                    q = q.to(tl.float32) * scale
                acc = dot(tl.trans(q), do, acc, PRECISION)

    if HAS_INITIAL:
        base = d_memory + tl.cast(lane, tl.int64) * state_size
        store_tile(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, acc)
        if NORMALIZED and block % across == 0:
            base = d_normalizer + tl.cast(lane, tl.int64) * KEY_WIDTH
            tl.store(base + columns_k, d_z, mask=columns_k < KEY_WIDTH)
