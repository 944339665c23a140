"""Triton kernels of the nonlinear gated recurrence: the outputs of chunks, and the recurrent form.

Legend: CHUNK tokens are solved for at once; the state before each chunk is kept for the gradients.
"""

import triton
import triton.language as tl

from supra.kernels.nonlinear_gated.triton_newton import (
    load_block,
    load_decay,
    one_minus_exp,
    solve,
    store_block,
    tanh,
)
from supra.kernels.tiles import load_tile, offset, sequence, store_tile


@triton.jit
def chunk_output(
    query, key, value, log_decay, weight, state, output, states, end_state, solved,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, decay_batch, decay_time, decay_head,
    output_block, length, heads, scale, sweeps, tolerance,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, HAS_INITIAL: tl.constexpr,
    SAVE_STATES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Outputs of a block [BLOCK_K, BLOCK_V] of the state, its last state, and how it was solved.

    grid: (N * H * blocks,). output: [blocks of K, B, T, H, V], what each of them adds. solved:
    [2, N * H * blocks], the largest residual and the most sweeps of a chunk.
    """
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = across * ((KEY_WIDTH + BLOCK_K - 1) // BLOCK_K)
    lane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, head = lane // heads, lane % heads
    column_k, column_v = (block // across) * BLOCK_K, (block % across) * BLOCK_V
    left_k, left_v = KEY_WIDTH - column_k, VALUE_WIDTH - column_v
    corner = column_k * VALUE_WIDTH + column_v  # of the block in a state
    times = tl.arange(0, CHUNK)
    rows = times[:, None, None]
    row, begin, tokens, chunk = sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)

    query += offset(row, query_batch, begin, query_time, head, query_head) + column_k
    key += offset(row, key_batch, begin, key_time, head, key_head) + column_k
    value += offset(row, value_batch, begin, value_time, head, value_head) + column_v
    log_decay += offset(row, decay_batch, begin, decay_time, head, decay_head)
    output += (block // across) * tl.cast(output_block, tl.int64)
    output += ((row * tl.cast(length, tl.int64) + begin) * heads + head) * VALUE_WIDTH
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += (tl.cast(chunk, tl.int64) * heads + head) * state_size
    weight += head * state_size + corner
    a = load_block(weight, VALUE_WIDTH, left_k, left_v, BLOCK_K, BLOCK_V)[None, :, :]
    s = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_INITIAL:
        state += tl.cast(lane, tl.int64) * state_size + corner
        s = load_block(state, VALUE_WIDTH, left_k, left_v, BLOCK_K, BLOCK_V)

    worst, most = 0.0, 0
    for c in range(0, tl.cdiv(tokens, CHUNK)):
        if SAVE_STATES:
            kept = states + c * tl.cast(heads, tl.int64) * state_size + corner
            store_block(kept, VALUE_WIDTH, left_k, left_v, s)
        left = tokens - c * CHUNK
        at = tl.cast(c * CHUNK, tl.int64)
        k = load_block(key + at * key_time, key_time, left, left_k, CHUNK, BLOCK_K)
        v = load_block(value + at * value_time, value_time, left, left_v, CHUNK, BLOCK_V)
        keep, write = load_decay(log_decay + at * decay_time, decay_time, times, left)
        written = k[:, :, None] * v[:, None, :]
        before, new, residual, done = solve(
            written, keep, write, a, s[None, :, :], rows, sweeps, tolerance, CHUNK
        )
        worst, most = tl.maximum(worst, residual), tl.maximum(most, done)
        after = keep * before + write * new
        s = tl.sum(tl.where(rows == CHUNK - 1, after, 0.0), 0)
        q = load_block(query + at * query_time, query_time, left, left_k, CHUNK, BLOCK_K)
        out = tl.sum(q[:, :, None] * after, 1) * scale
        place = output + at * heads * VALUE_WIDTH + column_v
        store_block(place, heads * VALUE_WIDTH, left, left_v, out)
    end_state += tl.cast(lane, tl.int64) * state_size + corner
    store_block(end_state, VALUE_WIDTH, left_k, left_v, s)
    tl.store(solved + tl.program_id(0), worst)
    tl.store(solved + tl.num_programs(0) + tl.program_id(0), most)


@triton.jit
def recurrent_steps(
    query, key, value, log_decay, weight, state, output,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, decay_batch, decay_time, decay_head,
    length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The recurrence token by token with the state in registers.

    grid: (B * H * blocks of V,). A program reads and writes its own block of the state only.
    """
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    lane, block = tl.program_id(0) // across, tl.program_id(0) % across
    n, head = tl.cast(lane // heads, tl.int64), lane % heads
    columns_k = tl.arange(0, BLOCK_K)
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    valid_k, valid_v = columns_k < KEY_WIDTH, columns_v < VALUE_WIDTH
    query += offset(n, query_batch, 0, query_time, head, query_head) + columns_k
    key += offset(n, key_batch, 0, key_time, head, key_head) + columns_k
    value += offset(n, value_batch, 0, value_time, head, value_head) + columns_v
    log_decay += offset(n, decay_batch, 0, decay_time, head, decay_head)
    output += (n * length * heads + head) * VALUE_WIDTH + columns_v
    weight += head * KEY_WIDTH * VALUE_WIDTH
    state += tl.cast(lane, tl.int64) * KEY_WIDTH * VALUE_WIDTH
    a = load_tile(weight, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
    s = load_tile(state, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
    for t in range(0, length):
        k = tl.load(key + offset(0, 0, t, key_time, 0, 0), mask=valid_k, other=0.0)
        v = tl.load(value + offset(0, 0, t, value_time, 0, 0), mask=valid_v, other=0.0)
        q = tl.load(query + offset(0, 0, t, query_time, 0, 0), mask=valid_k, other=0.0)
        x = tl.load(log_decay + offset(0, 0, t, decay_time, 0, 0)).to(tl.float32)
        new = tanh(a * s + k.to(tl.float32)[:, None] * v.to(tl.float32)[None, :])
        s = tl.exp(x) * s + one_minus_exp(x) * new
        out = tl.sum(q.to(tl.float32)[:, None] * s, 0) * scale
        tl.store(output + t * tl.cast(heads, tl.int64) * VALUE_WIDTH, out, mask=valid_v)
    store_tile(state, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, s)
