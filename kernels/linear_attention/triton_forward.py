"""Triton kernels of linear attention: states, outputs, and the recurrent form.

Legend: Hq query heads, Hs state heads, Hkv key heads; QUERIES = Hq / Hs, STATES = Hs / Hkv. Rows of
a tile are tokens. The state before chunk c of sequence n lies in slot c + n of `states`, so that
each sequence has one slot more than chunks, for the state after it.
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
    sequence_of,
    store_tile,
)


@triton.jit
def chunk_states(
    key, value, sums, memory, normalizer, states, normalizers, end_memory, end_normalizer,
    cu_seqlens, chunk_offsets,
    key_batch, key_time, key_head, value_batch, value_time, value_head,
    sums_batch, sums_time, sums_head, length, heads,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STATES: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORMALIZED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_END: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States before every chunk and after the last, one block [BLOCK_K, BLOCK_V] a program.

    grid: (N * Hs * blocks,). Keys are scaled by the decay to the end of their chunk, since they
    serve the state and the normalizer both.
    """
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = across * ((KEY_WIDTH + BLOCK_K - 1) // BLOCK_K)
    lane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, head = lane // heads, lane % heads
    columns_k = (block // across) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns_v = (block % across) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.arange(0, TILE)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)

    key += offset(row, key_batch, begin, key_time, head // STATES, key_head)
    value += offset(row, value_batch, begin, value_time, head // STATES, value_head)
    key_step, value_step = tl.cast(key_time, tl.int64), tl.cast(value_time, tl.int64)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    slot = tl.cast(first + n, tl.int64) * heads + head
    states += slot * state_size
    state_step = tl.cast(heads, tl.int64) * state_size
    normalizer_step = tl.cast(heads, tl.int64) * KEY_WIDTH
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_INITIAL:
        base = memory + tl.cast(lane, tl.int64) * state_size
        acc = load_tile(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
    if NORMALIZED:
        normalizers += slot * KEY_WIDTH
        sum_k = tl.zeros([BLOCK_K], tl.float32)
        if HAS_INITIAL:
            base = normalizer + tl.cast(lane, tl.int64) * KEY_WIDTH
            sum_k = tl.load(base + columns_k, mask=columns_k < KEY_WIDTH, other=0.0)
    if HAS_DECAY:
        sums += offset(row, sums_batch, begin, sums_time, head, sums_head)

    for c in range(0, tl.cdiv(tokens, CHUNK)):
        store_tile(
            states + c * state_step, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH,
            narrow(acc, PRECISION),
        )  # fmt: skip
        if NORMALIZED and block % across == 0:
            base = normalizers + c * normalizer_step
            tl.store(base + columns_k, sum_k, mask=columns_k < KEY_WIDTH)
        if HAS_DECAY:
            sums_c = sums + c * CHUNK * tl.cast(sums_time, tl.int64)
            last = sums_c + tl.minimum(tokens - c * CHUNK, CHUNK) * 2 - 2
            whole_high, whole_low = tl.load(last), tl.load(last + 1)
            whole = tl.exp(whole_high + whole_low)
            acc *= whole
            if NORMALIZED:
                sum_k *= whole
        for t in range(0, CHUNK, TILE):
            at = c * CHUNK + t
            k = load_tile(key + at * key_step, key_time, rows, tokens - at, columns_k, KEY_WIDTH)
            v = load_tile(
                value + at * value_step, value_time, rows, tokens - at, columns_v, VALUE_WIDTH
            )
            if HAS_DECAY:
                high, low = load_pairs(sums_c + t * 2, rows, tokens - at)
                k = k * tl.exp((whole_high - high) + (whole_low - low))[:, None]
            if NORMALIZED:
                sum_k += tl.sum(k.to(tl.float32), 0)
            acc = dot(tl.trans(k), v, acc, PRECISION)

    c = tl.cdiv(tokens, CHUNK)
    store_tile(
        states + c * state_step, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH,
        narrow(acc, PRECISION),
    )  # fmt: skip
    if NORMALIZED and block % across == 0:
        base = normalizers + c * normalizer_step
        tl.store(base + columns_k, sum_k, mask=columns_k < KEY_WIDTH)
    if HAS_END:
        base = end_memory + tl.cast(lane, tl.int64) * state_size
        store_tile(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, acc)
        if NORMALIZED and block % across == 0:
            base = end_normalizer + tl.cast(lane, tl.int64) * KEY_WIDTH
            tl.store(base + columns_k, sum_k, mask=columns_k < KEY_WIDTH)


@triton.jit
def chunk_output(
    query, key, value, sums, states, normalizers, output, weights, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, sums_batch, sums_time, sums_head,
    sequences, length, heads, scale, eps,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr,
    HAS_DECAY: tl.constexpr, NORMALIZED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output tiles [TILE, BLOCK_V], and the sums of the weights; heads = Hq.

    grid: (chunks * CHUNK / TILE * blocks of V, Hq).
    """
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
    state_head = head // QUERIES
    kv_head = state_head // STATES
    token = begin + chunk_at

    query += offset(row, query_batch, token + part * TILE, query_time, head, query_head)
    key += offset(row, key_batch, token, key_time, kv_head, key_head)
    value += offset(row, value_batch, token, value_time, kv_head, value_head)
    slot = tl.cast(chunk + n, tl.int64) * (heads // QUERIES) + state_head
    states += slot * KEY_WIDTH * VALUE_WIDTH
    acc = tl.zeros([TILE, BLOCK_V], tl.float32)
    weight = tl.zeros([TILE], tl.float32)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns_k = k0 + tl.arange(0, BLOCK_K)
        q = load_tile(query, query_time, rows, left - part * TILE, columns_k, KEY_WIDTH)
        s = load_tile(states, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
        acc = dot(q, s, acc, PRECISION)
        if NORMALIZED:
            base = normalizers + slot * KEY_WIDTH
            z = tl.load(base + columns_k, mask=columns_k < KEY_WIDTH, other=0.0)
            weight += tl.sum(q.to(tl.float32) * z[None, :], 1)
    if HAS_DECAY:
        sums += offset(row, sums_batch, token, sums_time, state_head, sums_head)
        base = sums + part * TILE * 2
        high, low = load_pairs(base, rows, left - part * TILE)
        entering = tl.exp(high + low)
        acc *= entering[:, None]
        weight *= entering

    for j in range(0, part + 1):
        scores = tl.zeros([TILE, TILE], tl.float32)
        for k0 in range(0, KEY_WIDTH, BLOCK_K):
            columns_k = k0 + tl.arange(0, BLOCK_K)
            q = load_tile(query, query_time, rows, left - part * TILE, columns_k, KEY_WIDTH)
            k = load_tile(
                key + j * TILE * key_time, key_time, rows, left - j * TILE, columns_k, KEY_WIDTH
            )
            scores = dot(q, tl.trans(k), scores, PRECISION)
        past = (part * TILE + rows)[:, None] >= (j * TILE + rows)[None, :]
        if HAS_DECAY:
            base = sums + j * TILE * 2
            high_j, low_j = load_pairs(base, rows, left - j * TILE)
            logs = (high[:, None] - high_j[None, :]) + (low[:, None] - low_j[None, :])
            scores *= tl.exp(tl.where(past, logs, float("-inf")))
        else:
            scores = tl.where(past, scores, 0.0)
        weight += tl.sum(scores, 1)
        v = load_tile(
            value + j * TILE * value_time, value_time, rows, left - j * TILE, columns_v, VALUE_WIDTH
        )
        acc = dot(scores, v, acc, PRECISION)

    place = (row * tl.cast(length, tl.int64) + token + part * TILE) * heads + head
    if NORMALIZED:
        if block == 0:
            tl.store(weights + place + rows * heads, weight, mask=rows < left - part * TILE)
        acc /= (weight + eps)[:, None]
    else:
        acc *= scale
    store_tile(
        output + place * VALUE_WIDTH, heads * VALUE_WIDTH, rows, left - part * TILE,
        columns_v, VALUE_WIDTH, acc,
    )  # fmt: skip


@triton.jit
def recurrent_steps(
    query, key, value, log_decay, memory, normalizer, end_normalizer, output,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, decay_batch, decay_time, decay_head,
    length, heads, scale, eps,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """The recurrence token by token with the state in registers; heads = Hs.

    grid: (N * Hs * blocks of V,). memory is updated in place: a program reads and writes its own
    block only. The normalizer, which all blocks of a head read, ends up in end_normalizer.
    """
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    lane, block = tl.program_id(0) // across, tl.program_id(0) % across
    n, head = tl.cast(lane // heads, tl.int64), lane % heads
    columns_k = tl.arange(0, BLOCK_K)
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    valid_k, valid_v = columns_k < KEY_WIDTH, columns_v < VALUE_WIDTH
    query += offset(n, query_batch, 0, query_time, head * QUERIES, query_head) + columns_k
    key += offset(n, key_batch, 0, key_time, head // STATES, key_head) + columns_k
    value += offset(n, value_batch, 0, value_time, head // STATES, value_head) + columns_v
    output += (n * length * heads + head) * QUERIES * VALUE_WIDTH + columns_v
    place = tl.cast(lane, tl.int64) * KEY_WIDTH
    s = load_tile(
        memory + place * VALUE_WIDTH, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH
    )
    if NORMALIZED:
        z = tl.load(normalizer + place + columns_k, mask=valid_k, other=0.0)
    for t in range(0, length):
        k = tl.load(key + t * tl.cast(key_time, tl.int64), mask=valid_k, other=0.0).to(tl.float32)
        v = tl.load(value + t * tl.cast(value_time, tl.int64), mask=valid_v, other=0.0)
        if HAS_DECAY:
            g = tl.load(log_decay + offset(n, decay_batch, t, decay_time, head, decay_head))
            a = tl.exp(g.to(tl.float32))
            s *= a
            if NORMALIZED:
                z *= a
        s += k[:, None] * v.to(tl.float32)[None, :]
        if NORMALIZED:
            z += k
        for r in range(0, QUERIES):
            place_q = offset(0, 0, t, query_time, r, query_head)
            q = tl.load(query + place_q, mask=valid_k, other=0.0).to(tl.float32)
            out = tl.sum(q[:, None] * s, 0)
            if NORMALIZED:
                out /= tl.sum(q * z, 0) + eps
            else:
                out *= scale
            place_o = (t * tl.cast(heads, tl.int64) * QUERIES + r) * VALUE_WIDTH
            tl.store(output + place_o, out, mask=valid_v)
    store_tile(
        memory + place * VALUE_WIDTH, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, s
    )  # fmt: skip
    if NORMALIZED and block == 0:
        tl.store(end_normalizer + place + columns_k, z, mask=valid_k)
