"""Triton kernels of the delta rule's gradients of states, values and strengths.

Legend as in delta_forward.py. u = beta e is what a token writes. `d_written` is the gradient of u
that comes from the outputs and from the state after the chunk; with it dv = T^T (beta du), and dv
is the gradient of all that e is made of: dA = -dv u^T, d(exp(G) k) = -dv S^T. heads = Hkv
throughout.
"""

import triton
import triton.language as tl

from supra.kernels import delta_state, locate, tiles
from supra.kernels.decay import entering_decay, last_pair, leaving_decay
from supra.kernels.delta_forward import not_zero
from supra.kernels.launch import Rows


@triton.jit
def chunk_d_states(
    query, key, beta, d_output, sums, whole, reading, d_written, d_end, d_states, d_initial, seqs,
    heads, scale, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
    CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the state after every chunk, from the last to the first, and all of du.

    grid: (N * Hkv * blocks of V,). The mirror of chunk_states. With CHANNELS, the queries have the
    decay since the begin of their chunk in them.
    """
    lane, n, head, _, _, columns_k, columns_v = locate.block_of_state(
        heads, BLOCK_K, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    rows = tl.arange(0, CHUNK)
    row, begin, tokens, first = locate.sequence(n, seqs, CHUNK)
    query = locate.at(query, row, begin, head * QUERIES)
    d_output = locate.at(d_output, row, begin, head * QUERIES)
    key = locate.at(key, row, begin, head)
    beta = locate.at(beta, row, begin, head)
    if HAS_DECAY:
        sums = locate.at(sums, row, begin, head)
    reading += locate.dense_offset(row, begin, seqs.length, head, heads, KEY_WIDTH)
    d_written += locate.dense_offset(row, begin, seqs.length, head, heads, VALUE_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    step = tl.cast(heads, tl.int64)
    ds = delta_state.zeros(BLOCK_K, BLOCK_V)
    if d_end is not None:
        base = d_end + lane * state_size
        ds = delta_state.load(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)

    count = tl.cdiv(tokens, CHUNK)
    for back in range(0, count):
        c = count - 1 - back
        at = c * CHUNK
        left, far = tokens - at, tl.cast(at, tl.int64)
        slot = d_states + locate.slot_offset(first + c, head, heads, state_size)
        k_at = locate.skip(key, far)
        du = delta_state.store_and_read(
            slot, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, ds, k_at, left, rows, PRECISION
        )
        entering = scale
        if HAS_DECAY:
            sums_at = locate.skip(sums, at)
            own, last = tiles.load_pairs(sums_at.data, rows, left), last_pair(sums_at, left, CHUNK)
            du *= leaving_decay(own, last)[:, None]
            ds = delta_state.scale(ds, entering_decay(last), columns_k, KEY_WIDTH)
            entering = (entering_decay(own) * scale)[:, None]
        if CHANNELS:
            whole_at = whole + locate.slot_offset(first + c, head, heads, KEY_WIDTH)
            ds = delta_state.scale_channels(ds, whole_at, columns_k, KEY_WIDTH)
        place = d_written + at * step * VALUE_WIDTH
        du += tiles.load(place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        kept = tiles.narrow(du, PRECISION)
        tiles.store(place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, kept)
        b = tiles.load_numbers(locate.skip(beta, far), rows, left)
        w_at = Rows(reading + at * step * KEY_WIDTH, 0, heads * KEY_WIDTH, 0)
        ds = delta_state.write(
            ds, w_at, left, rows, columns_k, -du * b[:, None], KEY_WIDTH, PRECISION
        )
        for r in range(0, QUERIES):
            d_at = locate.skip_heads(locate.skip(d_output, far), r)
            do = tiles.load_rows(d_at, rows, left, columns_v, VALUE_WIDTH) * entering
            q_at = locate.skip_heads(locate.skip(query, far), r)
            ds = delta_state.write(ds, q_at, left, rows, columns_k, do, KEY_WIDTH, PRECISION)

    if d_initial is not None:
        base = d_initial + lane * state_size
        delta_state.store(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, ds, "float32")


@triton.jit
def chunk_d_value(
    beta, inverse, errors, d_written, d_value, d_beta, seqs, heads, total,
    VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, and d beta = e . dv / beta in blocks of channels, [blocks, Hkv, B * T].

    As e . du less what later tokens take of it, d beta would cancel: up to 4 times the error in
    bf16, where keys are alike.
    grid: (chunks * blocks of V, Hkv).
    """
    _, block, head, _, row, token, left, rows, columns = locate.chunk(
        seqs, VALUE_WIDTH, BLOCK_V, CHUNK
    )
    if left <= 0:
        return
    inverse += locate.dense_offset(row, token, seqs.length, head, heads, CHUNK)
    t = tiles.load(inverse, heads * CHUNK, rows, left, rows, CHUNK)
    place = locate.dense_offset(row, token, seqs.length, head, heads, VALUE_WIDTH)
    du = tiles.load(d_written + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
    beta = locate.at(beta, row, token, head)
    b = not_zero(tiles.load_numbers(beta, rows, left))
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    acc = tiles.dot(tl.trans(t), du * b[:, None], acc, PRECISION)
    e = tiles.load(errors + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
    base = d_beta + locate.lane_offset(block * heads + head, total, row, token, seqs.length)
    tiles.store_vector(base, rows, left, tl.sum(e.to(tl.float32) * acc, 1) / b)
    kept = tiles.narrow(acc, PRECISION)
    tiles.store(d_value + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH, kept)
