"""The Triton kernel of the gradients of the nonlinear gated recurrence."""

import triton
import triton.language as tl

from supra.kernels import locate
from supra.kernels.nonlinear_gated.triton_newton import (
    affine_scan,
    load_block,
    load_decay,
    load_tokens,
    solve,
    store_block,
)


@triton.jit
def chunk_gradients(
    query, key, value, log_decay, weight, states, d_output, d_end, d_query, d_key, d_value,
    d_log_decay, d_weight, d_state, seqs, key_block, value_block, decay_block, heads, scale, sweeps,
    tolerance, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What a block [BLOCK_K, BLOCK_V] of the state adds to every gradient.

    grid: (N * H * blocks,). The states of a chunk are solved for again, from the state before it;
    the gradients of the states are the same scan backwards in time, with their true Jacobians.
    d_query, d_key: [blocks of V, B, T, H, K], d_value: [blocks of K, B, T, H, V], d_log_decay:
    [blocks, B, T, H], d_weight: [N, H, K, V].
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
    d_output = locate.at(d_output, row, begin, head, column_v)
    place = locate.dense_offset(row, begin, seqs.length, head, heads, 1)
    key_place = block_v * tl.cast(key_block, tl.int64) + place * KEY_WIDTH
    d_query += key_place
    d_key += key_place
    d_value += block_k * tl.cast(value_block, tl.int64) + place * VALUE_WIDTH
    block = block_k * ((VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V) + block_v
    d_log_decay += block * tl.cast(decay_block, tl.int64) + place
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += locate.slot_offset(chunk, head, heads, state_size)
    own = lane * state_size
    weight += head * state_size + corner
    a = load_block(weight, VALUE_WIDTH, left_k, left_v, BLOCK_K, BLOCK_V)[None, :, :]
    da = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    ds = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if d_end is not None:
        ds = load_block(d_end + own + corner, VALUE_WIDTH, left_k, left_v, BLOCK_K, BLOCK_V)

    chunks = tl.cdiv(tokens, CHUNK)
    for i in range(0, chunks):
        c = chunks - 1 - i
        left = tokens - c * CHUNK
        at = tl.cast(c * CHUNK, tl.int64)
        base = states + c * tl.cast(heads, tl.int64) * state_size
        s = load_block(base + corner, VALUE_WIDTH, left_k, left_v, BLOCK_K, BLOCK_V)[None, :, :]
        k = load_tokens(key, at, left, left_k, CHUNK, BLOCK_K)
        v = load_tokens(value, at, left, left_v, CHUNK, BLOCK_V)
        keep, write = load_decay(log_decay, at, times, left)
        k, v = k[:, :, None], v[:, None, :]
        before, new, _, _ = solve(k * v, keep, write, a, s, rows, sweeps, tolerance, CHUNK)

        q = load_tokens(query, at, left, left_k, CHUNK, BLOCK_K)
        d = load_tokens(d_output, at, left, left_v, CHUNK, BLOCK_V)
        d_q, d_k, d_v, d_g, d_a, ds = _gradients(
            q[:, :, None], k, v, d[:, None, :] * scale, keep, write, a, before, new, ds, rows, CHUNK
        )
        da += d_a
        at_key, key_stride = at * heads * KEY_WIDTH + column_k, heads * KEY_WIDTH
        store_block(d_query + at_key, key_stride, left, left_k, d_q)
        store_block(d_key + at_key, key_stride, left, left_k, d_k)
        base = d_value + at * heads * VALUE_WIDTH + column_v
        store_block(base, heads * VALUE_WIDTH, left, left_v, d_v)
        tl.store(d_log_decay + (at + times) * heads, d_g, mask=times < left)
    store_block(d_weight + own + corner, VALUE_WIDTH, left_k, left_v, da)
    if d_state is not None:
        store_block(d_state + own + corner, VALUE_WIDTH, left_k, left_v, ds)


@triton.jit
def _gradients(q, k, v, d, keep, write, weight, before, new, ds, rows, CHUNK: tl.constexpr):
    """Gradients of query, key, value, log_decay, weight, and of the state before the chunk.

    d: gradient of the output; ds: that of the state after the chunk; all else as for solve().
    """
    d_query = tl.sum(d * (keep * before + write * new), 2)
    bent = write * (1.0 - new * new)
    slope = keep + bent * weight
    entering = tl.where(rows == CHUNK - 1, ds[None, :, :], 0.0)
    leaving, later = affine_scan(slope, slope * (q * d), entering, True)
    ds = tl.sum(tl.where(rows == 0, leaving, 0.0), 0)
    d_after = q * d + later  # of the state after each token
    d_log_decay = tl.sum(tl.sum(keep * (before - new) * d_after, 2), 1)
    d_bent = bent * d_after
    d_weight = tl.sum(d_bent * before, 0)
    return d_query, tl.sum(d_bent * v, 2), tl.sum(d_bent * k, 1), d_log_decay, d_weight, ds
