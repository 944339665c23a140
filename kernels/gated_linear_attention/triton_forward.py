"""Triton kernels of gated linear attention: states, scores, outputs, and the recurrent form.

Legend: a chunk is one tile of TILE tokens; QUERIES = Hq / Hkv. The state before chunk c of sequence
n lies in slot c + n of `states`, so that each sequence has one slot more than chunks, for the state
after it. Scores are kept as [B, T, Hq, TILE], a row of its chunk for every token.
"""

import triton
import triton.language as tl

from supra.kernels.gated_linear_attention.triton_decay import (
    boundary_decay,
    crosses,
    entering_decay,
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
def chunk_states(
    key, value, sums, whole, state, states, end_state, cu_seqlens, chunk_offsets,
    key_batch, key_time, key_head, value_batch, value_time, value_head, length, heads,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_END: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States before every chunk and after the last, one block [BLOCK_K, BLOCK_V] a program.

    grid: (N * Hkv * blocks,).
    """
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = across * ((KEY_WIDTH + BLOCK_K - 1) // BLOCK_K)
    lane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, head = lane // heads, lane % heads
    columns_k = (block // across) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns_v = (block % across) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.arange(0, TILE)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, TILE, PACKED)

    key += offset(row, key_batch, begin, key_time, head, key_head)
    value += offset(row, value_batch, begin, value_time, head, value_head)
    key_step, value_step = tl.cast(key_time, tl.int64), tl.cast(value_time, tl.int64)
    sums += ((row * tl.cast(length, tl.int64) + begin) * heads + head) * KEY_WIDTH
    sums_step = tl.cast(heads, tl.int64) * KEY_WIDTH
    whole += (tl.cast(first, tl.int64) * heads + head) * KEY_WIDTH
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += (tl.cast(first + n, tl.int64) * heads + head) * state_size
    state_step = tl.cast(heads, tl.int64) * state_size
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_INITIAL:
        state += tl.cast(lane, tl.int64) * state_size
        acc = load_tile(state, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)

    chunks = tl.cdiv(tokens, TILE)
    for c in range(0, chunks):
        store_tile(
            states + c * state_step, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH,
            narrow(acc, PRECISION),
        )  # fmt: skip
        left = tokens - c * TILE
        k = load_tile(key + c * TILE * key_step, key_time, rows, left, columns_k, KEY_WIDTH)
        v = load_tile(value + c * TILE * value_step, value_time, rows, left, columns_v, VALUE_WIDTH)
        sums_at = sums + c * TILE * sums_step
        k *= leaving_decay(sums_at, heads * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH)
        decay = tl.load(whole + c * sums_step + columns_k, mask=columns_k < KEY_WIDTH, other=0.0)
        acc *= decay[:, None]
        acc = dot(tl.trans(k), v, acc, PRECISION)
    store_tile(
        states + chunks * state_step, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH,
        narrow(acc, PRECISION),
    )  # fmt: skip
    if HAS_END:
        base = end_state + tl.cast(lane, tl.int64) * state_size
        store_tile(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, acc)


@triton.jit
def chunk_scores(
    query, key, sums, bonus, scores, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    sequences, length, heads,
    KEY_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, QUERIES: tl.constexpr,
    LEVELS: tl.constexpr, HAS_BONUS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the pairs of tokens in a chunk, zero in the future; heads = Hq.

    grid: (chunks, Hq). Each level is one product of the whole tile, of which it keeps its blocks.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    n = sequence_of(chunk, chunk_offsets, sequences, length, TILE, PACKED)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, TILE, PACKED)
    left = tokens - (chunk - first) * TILE
    if left <= 0:
        return
    token = begin + (chunk - first) * TILE
    place = row * tl.cast(length, tl.int64) + token
    rows = tl.arange(0, TILE)
    query += offset(row, query_batch, token, query_time, head, query_head)
    key += offset(row, key_batch, token, key_time, head // QUERIES, key_head)
    sums += (place * (heads // QUERIES) + head // QUERIES) * KEY_WIDTH
    step = heads // QUERIES * KEY_WIDTH

    acc = tl.zeros([TILE, TILE], tl.float32)
    own = tl.zeros([TILE], tl.float32)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns = k0 + tl.arange(0, BLOCK_K)
        q = load_tile(query, query_time, rows, left, columns, KEY_WIDTH)
        k = load_tile(key, key_time, rows, left, columns, KEY_WIDTH)
        both = q.to(tl.float32) * k.to(tl.float32)
        if HAS_BONUS:
            u = tl.load(bonus + head * KEY_WIDTH + columns, mask=columns < KEY_WIDTH, other=0.0)
            both *= u[None, :]
        own += tl.sum(both, 1)
        for level in range(0, LEVELS):
            size = 1 << level
            decay = boundary_decay(sums, step, rows, left, columns, size, KEY_WIDTH, HAS_BONUS)
            found = dot(q * decay, tl.trans(k * decay), tl.zeros_like(acc), PRECISION)
            acc += tl.where(crosses(rows[:, None], rows[None, :], size), found, 0.0)
    acc += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
    base = scores + (place * heads + head) * TILE
    store_tile(base, heads * TILE, rows, left, rows, TILE, narrow(acc, PRECISION))


@triton.jit
def chunk_output(
    query, value, sums, scores, states, output, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, value_batch, value_time, value_head,
    sequences, length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_BONUS: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output tiles [TILE, BLOCK_V]; heads = Hq. grid: (chunks * blocks of V, Hq)."""
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    chunk, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    n = sequence_of(chunk, chunk_offsets, sequences, length, TILE, PACKED)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, TILE, PACKED)
    left = tokens - (chunk - first) * TILE
    if left <= 0:
        return
    token = begin + (chunk - first) * TILE
    place = row * tl.cast(length, tl.int64) + token
    rows = tl.arange(0, TILE)
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    kv_heads, kv_head = heads // QUERIES, head // QUERIES
    query += offset(row, query_batch, token, query_time, head, query_head)
    value += offset(row, value_batch, token, value_time, kv_head, value_head)
    sums += (place * kv_heads + kv_head) * KEY_WIDTH
    states += (tl.cast(chunk + n, tl.int64) * kv_heads + kv_head) * KEY_WIDTH * VALUE_WIDTH

    acc = tl.zeros([TILE, BLOCK_V], tl.float32)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns = k0 + tl.arange(0, BLOCK_K)
        q = load_tile(query, query_time, rows, left, columns, KEY_WIDTH)
        q *= entering_decay(sums, kv_heads * KEY_WIDTH, rows, left, columns, KEY_WIDTH, HAS_BONUS)
        s = load_tile(states, VALUE_WIDTH, columns, KEY_WIDTH, columns_v, VALUE_WIDTH)
        acc = dot(q, s, acc, PRECISION)
    a = load_tile(scores + (place * heads + head) * TILE, heads * TILE, rows, left, rows, TILE)
    v = load_tile(value, value_time, rows, left, columns_v, VALUE_WIDTH)
    acc = dot(a, v, acc, PRECISION) * scale
    base = output + (place * heads + head) * VALUE_WIDTH
    store_tile(base, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, acc)


@triton.jit
def recurrent_steps(
    query, key, value, log_decay, bonus, state, output,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, decay_batch, decay_time, decay_head,
    length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_BONUS: tl.constexpr,
):  # fmt: skip
    """The recurrence token by token with the state in registers; heads = Hkv.

    grid: (B * Hkv * blocks of V,). A program reads and writes its own block of the state only.
    """
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    lane, block = tl.program_id(0) // across, tl.program_id(0) % across
    n, head = tl.cast(lane // heads, tl.int64), lane % heads
    columns_k = tl.arange(0, BLOCK_K)
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    valid_k, valid_v = columns_k < KEY_WIDTH, columns_v < VALUE_WIDTH
    query += offset(n, query_batch, 0, query_time, head * QUERIES, query_head) + columns_k
    key += offset(n, key_batch, 0, key_time, head, key_head) + columns_k
    value += offset(n, value_batch, 0, value_time, head, value_head) + columns_v
    log_decay += offset(n, decay_batch, 0, decay_time, head, decay_head) + columns_k
    output += (n * length * heads + head) * QUERIES * VALUE_WIDTH + columns_v
    state += tl.cast(lane, tl.int64) * KEY_WIDTH * VALUE_WIDTH
    s = load_tile(state, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
    for t in range(0, length):
        k = tl.load(key + offset(0, 0, t, key_time, 0, 0), mask=valid_k, other=0.0)
        v = tl.load(value + offset(0, 0, t, value_time, 0, 0), mask=valid_v, other=0.0)
        g = tl.load(log_decay + offset(0, 0, t, decay_time, 0, 0), mask=valid_k, other=0.0)
        k, v = k.to(tl.float32), v.to(tl.float32)
        before = s
        s = s * tl.exp(g.to(tl.float32))[:, None] + k[:, None] * v[None, :]
        for r in range(0, QUERIES):
            q = tl.load(query + offset(0, 0, t, query_time, r, query_head), mask=valid_k, other=0.0)
            q = q.to(tl.float32)
            if HAS_BONUS:
                base = bonus + (head * QUERIES + r) * KEY_WIDTH
                u = tl.load(base + columns_k, mask=valid_k, other=0.0).to(tl.float32)
                out = tl.sum(q[:, None] * before, 0) + tl.sum(q * u * k, 0) * v
            else:
                out = tl.sum(q[:, None] * s, 0)
            place_o = (t * tl.cast(heads, tl.int64) * QUERIES + r) * VALUE_WIDTH
            tl.store(output + place_o, out * scale, mask=valid_v)
    store_tile(state, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, s)
