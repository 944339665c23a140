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


@triton.jit
def chunk_d_states(
    query, key, beta, d_output, sums, whole, reading, d_written, d_end, d_states, d_initial,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    beta_batch, beta_time, beta_head, sums_batch, sums_time, sums_head,
    length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
    CHANNELS: tl.constexpr, HAS_END: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the state after every chunk, from the last to the first, and all of du.

    grid: (N * Hkv * blocks of V,). The mirror of chunk_states. With CHANNELS, the queries have the
    decay since the begin of their chunk in them.
    """
    lane, n, head, _, _, columns_k, columns_v = locate.block_of_state(
        heads, BLOCK_K, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    rows = tl.arange(0, CHUNK)
    row, begin, tokens, first = locate.sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)
    query += locate.offset(row, query_batch, begin, query_time, head * QUERIES, query_head)
    d_output += locate.offset(row, d_batch, begin, d_time, head * QUERIES, d_head)
    key += locate.offset(row, key_batch, begin, key_time, head, key_head)
    beta += locate.offset(row, beta_batch, begin, beta_time, head, beta_head)
    if HAS_DECAY:
        sums += locate.offset(row, sums_batch, begin, sums_time, head, sums_head)
    reading += locate.dense_offset(row, begin, length, head, heads, KEY_WIDTH)
    d_written += locate.dense_offset(row, begin, length, head, heads, VALUE_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    step = tl.cast(heads, tl.int64)
    ds = delta_state.zeros(BLOCK_K, BLOCK_V)
    if HAS_END:
        base = d_end + lane * state_size
        ds = delta_state.load(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)

    count = tl.cdiv(tokens, CHUNK)
    for back in range(0, count):
        c = count - 1 - back
        at = c * CHUNK
        left = tokens - at
        slot = d_states + locate.slot_offset(first + c, head, heads, state_size)
        k_at = key + at * tl.cast(key_time, tl.int64)
        du = delta_state.store_and_read(
            slot, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, ds,
            k_at, key_time, left, rows, PRECISION,
        )  # fmt: skip
        entering = scale
        if HAS_DECAY:
            sums_at = sums + at * sums_time
            own, last = tiles.load_pairs(sums_at, rows, left), last_pair(sums_at, left, CHUNK)
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
        b = tiles.load_vector(beta + at * tl.cast(beta_time, tl.int64), beta_time, rows, left)
        w_at = reading + at * step * KEY_WIDTH
        ds = delta_state.write(
            ds, w_at, heads * KEY_WIDTH, left, rows, columns_k, -du * b[:, None],
            KEY_WIDTH, PRECISION,
        )  # fmt: skip
        for r in range(0, QUERIES):
            d_at = d_output + at * tl.cast(d_time, tl.int64) + r * tl.cast(d_head, tl.int64)
            do = tiles.load(d_at, d_time, rows, left, columns_v, VALUE_WIDTH) * entering
            q_at = query + at * tl.cast(query_time, tl.int64) + r * tl.cast(query_head, tl.int64)
            ds = delta_state.write(
                ds, q_at, query_time, left, rows, columns_k, do, KEY_WIDTH, PRECISION
            )

    if HAS_INITIAL:
        base = d_initial + lane * state_size
        delta_state.store(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, ds, "float32")


@triton.jit
def chunk_d_value(
    beta, inverse, errors, d_written, d_value, d_beta, cu_seqlens, chunk_offsets,
    beta_batch, beta_time, beta_head, sequences, length, heads, total,
    VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_V: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, and d beta = e . dv / beta in blocks of channels, [blocks, Hkv, B * T].

    As e . du less what later tokens take of it, d beta would cancel: up to 4 times the error in
    bf16, where keys are alike.
    grid: (chunks * blocks of V, Hkv).
    """
    _, block, head, _, row, token, left, rows, columns = locate.chunk(
        cu_seqlens, chunk_offsets, sequences, length, VALUE_WIDTH, BLOCK_V, CHUNK, PACKED
    )
    if left <= 0:
        return
    inverse += locate.dense_offset(row, token, length, head, heads, CHUNK)
    t = tiles.load(inverse, heads * CHUNK, rows, left, rows, CHUNK)
    place = locate.dense_offset(row, token, length, head, heads, VALUE_WIDTH)
    du = tiles.load(d_written + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
    beta += locate.offset(row, beta_batch, token, beta_time, head, beta_head)
    b = not_zero(tiles.load_vector(beta, beta_time, rows, left))
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    acc = tiles.dot(tl.trans(t), du * b[:, None], acc, PRECISION)
    e = tiles.load(errors + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
    base = d_beta + locate.offset(row, length, token, 1, block * heads + head, total)
    tiles.store_vector(base, rows, left, tl.sum(e.to(tl.float32) * acc, 1) / b)
    kept = tiles.narrow(acc, PRECISION)
    tiles.store(d_value + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH, kept)
