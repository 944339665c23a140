"""Triton kernels of gated linear attention's gradients.

Legend as in triton_forward. d_scores are the gradients of the scores, with the scale in them. The
gradient of a decay is summed over the pairs of tokens that it lies between, by products with
matrices of zeros and ones: the usual difference of running sums of q dq and k dk would cancel, and
what is left of 16-bit products is then mostly their rounding.
"""

import triton
import triton.language as tl

from supra.kernels.gated_linear_attention.triton_decay import (
    before_here,
    boundary_decay,
    crosses,
    entering_decay,
    from_here_on,
    leaving_decay,
)
from supra.kernels.tiles import (
    dot,
    load_tile,
    narrow,
    offset,
    sequence,
    sequence_of,
    store_tile,
)


@triton.jit
def chunk_d_states(
    query, d_output, sums, whole, states, d_end, d_states, d_whole, d_state,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, d_batch, d_time, d_head, length, heads, chunks, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_BONUS: tl.constexpr,
    HAS_END: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the state after every chunk, from the last chunk to the first; heads = Hkv.

    grid: (N * Hkv * blocks,). d_whole [blocks of V, chunks, Hkv, K] gets the gradient of the log of
    every chunk's whole decay.
    """
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = across * ((KEY_WIDTH + BLOCK_K - 1) // BLOCK_K)
    lane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, head = lane // heads, lane % heads
    columns_k = (block // across) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns_v = (block % across) * BLOCK_V + tl.arange(0, BLOCK_V)
    valid_k = columns_k < KEY_WIDTH
    rows = tl.arange(0, TILE)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, TILE, PACKED)

    query += offset(row, query_batch, begin, query_time, head * QUERIES, query_head)
    d_output += offset(row, d_batch, begin, d_time, head * QUERIES, d_head)
    query_step, d_step = tl.cast(query_time, tl.int64), tl.cast(d_time, tl.int64)
    sums += ((row * tl.cast(length, tl.int64) + begin) * heads + head) * KEY_WIDTH
    sums_step = tl.cast(heads, tl.int64) * KEY_WIDTH
    at_first = (tl.cast(first, tl.int64) * heads + head) * KEY_WIDTH
    whole += at_first
    d_whole += (block % across) * tl.cast(chunks, tl.int64) * sums_step + at_first
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += (tl.cast(first + n, tl.int64) * heads + head) * state_size
    d_states += (tl.cast(first, tl.int64) * heads + head) * state_size
    state_step = tl.cast(heads, tl.int64) * state_size
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_END:
        d_end += tl.cast(lane, tl.int64) * state_size
        acc = load_tile(d_end, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)

    count = tl.cdiv(tokens, TILE)
    for back in range(0, count):
        c = count - 1 - back
        store_tile(
            d_states + c * state_step, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH,
            narrow(acc, PRECISION),
        )  # fmt: skip
        s = load_tile(
            states + c * state_step, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH
        )
        acc *= tl.load(whole + c * sums_step + columns_k, mask=valid_k, other=0.0)[:, None]
        along = tl.sum(s.to(tl.float32) * acc, 1)
        tl.store(d_whole + c * sums_step + columns_k, along, mask=valid_k)
        left = tokens - c * TILE
        sums_at = sums + c * TILE * sums_step
        decay = scale * entering_decay(
            sums_at, heads * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH, HAS_BONUS
        )
        for r in range(0, QUERIES):
            q_at = query + c * TILE * query_step + r * tl.cast(query_head, tl.int64)
            d_at = d_output + c * TILE * d_step + r * tl.cast(d_head, tl.int64)
            q = load_tile(q_at, query_time, rows, left, columns_k, KEY_WIDTH) * decay
            do = load_tile(d_at, d_time, rows, left, columns_v, VALUE_WIDTH)
            acc = dot(tl.trans(q), do, acc, PRECISION)

    if HAS_INITIAL:
        base = d_state + tl.cast(lane, tl.int64) * state_size
        store_tile(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, acc)


@triton.jit
def chunk_d_scores(
    value, d_output, d_scores, cu_seqlens, chunk_offsets,
    value_batch, value_time, value_head, d_batch, d_time, d_head,
    sequences, length, heads, scale,
    VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores, those in the future included; heads = Hq. grid: (chunks, Hq)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    n = sequence_of(chunk, chunk_offsets, sequences, length, TILE, PACKED)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, TILE, PACKED)
    left = tokens - (chunk - first) * TILE
    if left <= 0:
        return
    token = begin + (chunk - first) * TILE
    rows = tl.arange(0, TILE)
    value += offset(row, value_batch, token, value_time, head // QUERIES, value_head)
    d_output += offset(row, d_batch, token, d_time, head, d_head)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns = v0 + tl.arange(0, BLOCK_V)
        do = load_tile(d_output, d_time, rows, left, columns, VALUE_WIDTH)
        v = load_tile(value, value_time, rows, left, columns, VALUE_WIDTH)
        acc = dot(do, tl.trans(v), acc, PRECISION)
    place = row * tl.cast(length, tl.int64) + token
    base = d_scores + (place * heads + head) * TILE
    store_tile(base, heads * TILE, rows, left, rows, TILE, narrow(acc * scale, PRECISION))


@triton.jit
def chunk_d_query(
    query, key, d_output, sums, bonus, states, d_scores, d_query, d_logs, d_bonus,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    sequences, length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, LEVELS: tl.constexpr,
    HAS_BONUS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, its part of the gradient of log_decay, and that of bonus per chunk; heads = Hq.

    grid: (chunks * blocks of K, Hq). d_logs [B, T, Hq, K], d_bonus [chunks, Hq, K].
    """
    across: tl.constexpr = (KEY_WIDTH + BLOCK_K - 1) // BLOCK_K
    chunk, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    n = sequence_of(chunk, chunk_offsets, sequences, length, TILE, PACKED)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, TILE, PACKED)
    left = tokens - (chunk - first) * TILE
    if left <= 0:
        return
    token = begin + (chunk - first) * TILE
    place = row * tl.cast(length, tl.int64) + token
    rows = tl.arange(0, TILE)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    kv_heads, kv_head = heads // QUERIES, head // QUERIES
    query += offset(row, query_batch, token, query_time, head, query_head)
    key += offset(row, key_batch, token, key_time, kv_head, key_head)
    d_output += offset(row, d_batch, token, d_time, head, d_head)
    sums += (place * kv_heads + kv_head) * KEY_WIDTH
    step = kv_heads * KEY_WIDTH
    states += (tl.cast(chunk + n, tl.int64) * kv_heads + kv_head) * KEY_WIDTH * VALUE_WIDTH

    acc = tl.zeros([TILE, BLOCK_K], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns_v = v0 + tl.arange(0, BLOCK_V)
        do = load_tile(d_output, d_time, rows, left, columns_v, VALUE_WIDTH)
        s = load_tile(states, VALUE_WIDTH, columns, KEY_WIDTH, columns_v, VALUE_WIDTH)
        acc = dot(do, tl.trans(s), acc, PRECISION)
    acc *= scale * entering_decay(sums, step, rows, left, columns, KEY_WIDTH, HAS_BONUS)
    q = load_tile(query, query_time, rows, left, columns, KEY_WIDTH)
    logs = tl.zeros([TILE, BLOCK_K], tl.float32)
    logs = dot(from_here_on(rows, TILE, HAS_BONUS), q * acc, logs, PRECISION)

    # in the loop q and k are loaded again: kept, they cost registers that then spill
    base = d_scores + (place * heads + head) * TILE
    ds = load_tile(base, heads * TILE, rows, left, rows, TILE)
    for level in range(0, LEVELS):
        size = 1 << level
        k = load_tile(key, key_time, rows, left, columns, KEY_WIDTH)
        decay = boundary_decay(sums, step, rows, left, columns, size, KEY_WIDTH, HAS_BONUS)
        block_ds = tl.where(crosses(rows[:, None], rows[None, :], size), ds, 0.0)
        found = dot(block_ds, k * decay, tl.zeros_like(acc), PRECISION) * decay
        acc += found
        q = load_tile(query, query_time, rows, left, columns, KEY_WIDTH)
        logs = dot(from_here_on(rows, size, HAS_BONUS), q * found, logs, PRECISION)

    k = load_tile(key, key_time, rows, left, columns, KEY_WIDTH)
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], ds.to(tl.float32), 0.0), 1)
    if HAS_BONUS:
        base = bonus + head * KEY_WIDTH
        u = tl.load(base + columns, mask=columns < KEY_WIDTH, other=0.0).to(tl.float32)
        base = d_bonus + (tl.cast(chunk, tl.int64) * heads + head) * KEY_WIDTH
        d_u = tl.sum(own[:, None] * q * k, 0)
        tl.store(base + columns, d_u, mask=columns < KEY_WIDTH)
        acc += own[:, None] * k * u[None, :]
    else:
        acc += own[:, None] * k
    at = (place * heads + head) * KEY_WIDTH
    store_tile(d_query + at, heads * KEY_WIDTH, rows, left, columns, KEY_WIDTH, acc)
    store_tile(d_logs + at, heads * KEY_WIDTH, rows, left, columns, KEY_WIDTH, logs)


@triton.jit
def chunk_d_key(
    query, key, value, sums, bonus, d_states, d_scores, d_whole, d_query_logs, d_key, d_log_decay,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, sequences, length, heads, chunks, value_blocks,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, LEVELS: tl.constexpr,
    HAS_BONUS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and the gradient of log_decay; heads = Hkv. grid: (chunks * blocks of K, Hkv)."""
    across: tl.constexpr = (KEY_WIDTH + BLOCK_K - 1) // BLOCK_K
    chunk, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    n = sequence_of(chunk, chunk_offsets, sequences, length, TILE, PACKED)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, TILE, PACKED)
    left = tokens - (chunk - first) * TILE
    if left <= 0:
        return
    token = begin + (chunk - first) * TILE
    place = (row * tl.cast(length, tl.int64) + token) * heads + head
    rows = tl.arange(0, TILE)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = columns < KEY_WIDTH
    query += offset(row, query_batch, token, query_time, head * QUERIES, query_head)
    key += offset(row, key_batch, token, key_time, head, key_head)
    value += offset(row, value_batch, token, value_time, head, value_head)
    sums += place * KEY_WIDTH
    step = heads * KEY_WIDTH
    d_scores += place * QUERIES * TILE
    slot = tl.cast(chunk, tl.int64) * heads + head
    d_states += slot * KEY_WIDTH * VALUE_WIDTH

    acc = tl.zeros([TILE, BLOCK_K], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns_v = v0 + tl.arange(0, BLOCK_V)
        v = load_tile(value, value_time, rows, left, columns_v, VALUE_WIDTH)
        s = load_tile(d_states, VALUE_WIDTH, columns, KEY_WIDTH, columns_v, VALUE_WIDTH)
        acc = dot(v, tl.trans(s), acc, PRECISION)
    acc *= leaving_decay(sums, step, rows, left, columns, KEY_WIDTH)
    k = load_tile(key, key_time, rows, left, columns, KEY_WIDTH)
    carried = tl.zeros([BLOCK_K], tl.float32)
    for i in range(0, value_blocks):
        part = d_whole + (i * tl.cast(chunks, tl.int64) * heads + slot) * KEY_WIDTH
        carried += tl.load(part + columns, mask=valid, other=0.0)
    logs = tl.zeros([TILE, BLOCK_K], tl.float32) + carried[None, :]
    for r in range(0, QUERIES):
        part = d_query_logs + (place * QUERIES + r) * KEY_WIDTH
        logs += load_tile(part, step * QUERIES, rows, left, columns, KEY_WIDTH)
    logs = dot(before_here(rows, TILE), k * acc, logs, PRECISION)

    for level in range(0, LEVELS):
        size = 1 << level
        decay = boundary_decay(sums, step, rows, left, columns, size, KEY_WIDTH, HAS_BONUS)
        found = tl.zeros([TILE, BLOCK_K], tl.float32)
        for r in range(0, QUERIES):
            q_at = query + r * tl.cast(query_head, tl.int64)
            q = load_tile(q_at, query_time, rows, left, columns, KEY_WIDTH)
            ds = load_tile(d_scores + r * TILE, heads * QUERIES * TILE, rows, left, rows, TILE)
            ds = tl.where(crosses(rows[:, None], rows[None, :], size), ds, 0.0)
            found = dot(tl.trans(ds), q * decay, found, PRECISION)
        found *= decay
        acc += found
        logs = dot(before_here(rows, size), k * found, logs, PRECISION)

    for r in range(0, QUERIES):
        q_at = query + r * tl.cast(query_head, tl.int64)
        q = load_tile(q_at, query_time, rows, left, columns, KEY_WIDTH).to(tl.float32)
        own_at = d_scores + r * TILE + rows * (heads * QUERIES * TILE + 1)
        own = tl.load(own_at, mask=rows < left, other=0.0).to(tl.float32)
        if HAS_BONUS:
            bonus_at = bonus + (head * QUERIES + r) * KEY_WIDTH
            q *= tl.load(bonus_at + columns, mask=valid, other=0.0)[None, :]
        acc += own[:, None] * q
    base = d_key + place * KEY_WIDTH
    store_tile(base, step, rows, left, columns, KEY_WIDTH, acc)
    base = d_log_decay + place * KEY_WIDTH
    store_tile(base, step, rows, left, columns, KEY_WIDTH, logs)


@triton.jit
def chunk_d_value(
    key, d_output, sums, scores, d_states, d_value, cu_seqlens, chunk_offsets,
    key_batch, key_time, key_head, d_batch, d_time, d_head, sequences, length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv; heads = Hkv. grid: (chunks * blocks of V, Hkv)."""
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    chunk, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    n = sequence_of(chunk, chunk_offsets, sequences, length, TILE, PACKED)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, TILE, PACKED)
    left = tokens - (chunk - first) * TILE
    if left <= 0:
        return
    token = begin + (chunk - first) * TILE
    place = (row * tl.cast(length, tl.int64) + token) * heads + head
    rows = tl.arange(0, TILE)
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    key += offset(row, key_batch, token, key_time, head, key_head)
    d_output += offset(row, d_batch, token, d_time, head * QUERIES, d_head)
    sums += place * KEY_WIDTH
    scores += place * QUERIES * TILE
    d_states += (tl.cast(chunk, tl.int64) * heads + head) * KEY_WIDTH * VALUE_WIDTH

    acc = tl.zeros([TILE, BLOCK_V], tl.float32)
    for r in range(0, QUERIES):
        a = load_tile(scores + r * TILE, heads * QUERIES * TILE, rows, left, rows, TILE)
        d_at = d_output + r * tl.cast(d_head, tl.int64)
        do = load_tile(d_at, d_time, rows, left, columns_v, VALUE_WIDTH)
        acc = dot(tl.trans(a), do, acc, PRECISION)
    acc *= scale
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns = k0 + tl.arange(0, BLOCK_K)
        k = load_tile(key, key_time, rows, left, columns, KEY_WIDTH)
        k *= leaving_decay(sums, heads * KEY_WIDTH, rows, left, columns, KEY_WIDTH)
        s = load_tile(d_states, VALUE_WIDTH, columns, KEY_WIDTH, columns_v, VALUE_WIDTH)
        acc = dot(k, s, acc, PRECISION)
    base = d_value + place * VALUE_WIDTH
    store_tile(base, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, acc)
