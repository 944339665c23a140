"""Triton kernels of the nonlinear gated recurrence: the outputs of chunks, and the recurrent form.

Legend: CHUNK tokens are solved for at once; the state before each chunk is kept for the gradients.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.nonlinear_gated.triton_newton import (
    load_block,
    load_decay,
    load_tokens,
    one_minus_exp,
    solve,
    store_block,
    tanh,
)


@triton.jit
def chunk_output(
    query, key, value, log_decay, weight, state, output, states, end_state, solved, seqs,
    output_block, heads, scale, sweeps, tolerance,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, SAVE_STATES: tl.constexpr,
):  # fmt: skip
    """Outputs of a block [BLOCK_K, BLOCK_V] of the state, its last state, and how it was solved.

    grid: (N * H * blocks,). output: [blocks of K, B, T, H, V], what each of them adds. solved:
    [2, N * H * blocks], the largest residual and the most sweeps of a chunk.
    """
    lane, n, head, block_k, block_v, _columns_k, _columns_v = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    column_k, column_v = block_k * BLOCK_K, block_v * BLOCK_V
    left_k, left_v = KEY_WIDTH - column_k, VALUE_WIDTH - column_v
    corner = column_k * VALUE_WIDTH + column_v  # of the block in a state
    times = tl.arange(0, CHUNK)
    rows = times[:, None, None]
    row, begin, tokens, chunk = locate.sequence(n, seqs, CHUNK)

    query = locate.at(query, row, begin, head, column_k)
    key = locate.at(key, row, begin, head, column_k)
    value = locate.at(value, row, begin, head, column_v)
    log_decay = locate.at(log_decay, row, begin, head)
    output += block_k * tl.cast(output_block, tl.int64)
    output += locate.dense_offset(row, begin, seqs.length, head, heads, VALUE_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += locate.slot_offset(chunk, head, heads, state_size)
    weight += head * state_size + corner
    a = load_block(weight, VALUE_WIDTH, left_k, left_v, BLOCK_K, BLOCK_V)[None, :, :]
    s = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if state is not None:
        state += lane * state_size + corner
        s = load_block(state, VALUE_WIDTH, left_k, left_v, BLOCK_K, BLOCK_V)

    worst, most = 0.0, 0
    for c in range(0, tl.cdiv(tokens, CHUNK)):
        if SAVE_STATES:
            kept = states + c * tl.cast(heads, tl.int64) * state_size + corner
            store_block(kept, VALUE_WIDTH, left_k, left_v, s)
        left = tokens - c * CHUNK
        at = tl.cast(c * CHUNK, tl.int64)
        k = load_tokens(key, at, left, left_k, CHUNK, BLOCK_K)
        v = load_tokens(value, at, left, left_v, CHUNK, BLOCK_V)
        keep, write = load_decay(log_decay, at, times, left)
        written = k[:, :, None] * v[:, None, :]
        before, new, residual, done = solve(
            written, keep, write, a, s[None, :, :], rows, sweeps, tolerance, CHUNK
        )
        worst, most = tl.maximum(worst, residual), tl.maximum(most, done)
        after = keep * before + write * new
        s = tl.sum(tl.where(rows == CHUNK - 1, after, 0.0), 0)
        q = load_tokens(query, at, left, left_k, CHUNK, BLOCK_K)
        out = tl.sum(q[:, :, None] * after, 1) * scale
        place = output + at * heads * VALUE_WIDTH + column_v
        store_block(place, heads * VALUE_WIDTH, left, left_v, out)
    end_state += lane * state_size + corner
    store_block(end_state, VALUE_WIDTH, left_k, left_v, s)
    tl.store(solved + tl.program_id(0), worst)
    tl.store(solved + tl.num_programs(0) + tl.program_id(0), most)


@triton.jit
def recurrent_steps(
    query, key, value, log_decay, weight, state, output, length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The recurrence token by token with the state in registers.

    grid: (B * H * blocks of V,). A program reads and writes its own block of the state only.
    """
    lane, n, head, _, _, columns_k, columns_v = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    query = locate.at(query, n, 0, head, columns_k)
    key = locate.at(key, n, 0, head, columns_k)
    value = locate.at(value, n, 0, head, columns_v)
    output += locate.dense_offset(n, 0, length, head, heads, VALUE_WIDTH) + columns_v
    weight += head * KEY_WIDTH * VALUE_WIDTH
    state += lane * (KEY_WIDTH * VALUE_WIDTH)
    a = tiles.load_state(weight, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
    s = tiles.load_state(state, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
    for t in range(0, length):
        k = tiles.load_token(key, t, columns_k, KEY_WIDTH)
        v = tiles.load_token(value, t, columns_v, VALUE_WIDTH)
        q = tiles.load_token(query, t, columns_k, KEY_WIDTH)
        x = tl.load(locate.at(log_decay, n, t, head).data)
        x = x.to(tl.float32)
        new = tanh(a * s + k[:, None] * v[None, :])
        s = tl.exp(x) * s + one_minus_exp(x) * new
        base = output + locate.dense_offset(0, t, length, 0, heads, VALUE_WIDTH)
        tl.store(base, tl.sum(q[:, None] * s, 0) * scale, mask=columns_v < VALUE_WIDTH)
    tiles.store_state(state, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, s)
