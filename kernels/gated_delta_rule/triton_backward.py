"""Triton kernels of the gradients of values, strengths and states; legend as in triton_forward.py.

u = beta e is what a token writes. `d_written` is the gradient of u that comes from the outputs and
from the state after the chunk; with it dv = T^T (beta du), and dv is the gradient of all that e is
made of: dB = -dv e^T, d(exp(G) k) = -dv S^T. heads = Hkv throughout.
"""

import triton
import triton.language as tl

from supra.kernels.gated_delta_rule.triton_forward import decay_between, kept, locate, not_zero
from supra.kernels.tiles import dot, load_pairs, load_tile, narrow, offset, sequence, store_tile


@triton.jit
def chunk_d_written(
    query, key, d_output, sums, d_written, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    sums_batch, sums_time, sums_head, sequences, length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du from the outputs of the chunk; grid: (chunks * blocks of V, Hkv)."""
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    chunk, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    _, row, token, left = locate(chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    query += offset(row, query_batch, token, query_time, head * QUERIES, query_head)
    d_output += offset(row, d_batch, token, d_time, head * QUERIES, d_head)
    key += offset(row, key_batch, token, key_time, head, key_head)
    if HAS_DECAY:
        sums += offset(row, sums_batch, token, sums_time, head, sums_head)
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for r in range(0, QUERIES):
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)  # [key token, query token]
        for k0 in range(0, KEY_WIDTH, BLOCK_K):
            columns_k = k0 + tl.arange(0, BLOCK_K)
            k = load_tile(key, key_time, rows, left, columns_k, KEY_WIDTH)
            q = load_tile(
                query + r * tl.cast(query_head, tl.int64),
                query_time, rows, left, columns_k, KEY_WIDTH,
            )  # fmt: skip
            scores = dot(k, tl.trans(q), scores, PRECISION)
        if HAS_DECAY:
            high, low = load_pairs(sums, rows, left)
            scores *= decay_between(high, low)
        scores = tl.where(rows[:, None] <= rows[None, :], scores * scale, 0.0)
        base = d_output + r * tl.cast(d_head, tl.int64)
        do = load_tile(base, d_time, rows, left, columns_v, VALUE_WIDTH)
        acc = dot(scores, do, acc, PRECISION)
    d_written += kept(row, token, length, head, heads, VALUE_WIDTH)
    store_tile(
        d_written, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, narrow(acc, PRECISION)
    )


@triton.jit
def chunk_d_states(
    query, key, beta, d_output, sums, reading, d_written, d_end, d_states, d_initial,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    beta_batch, beta_time, beta_head, sums_batch, sums_time, sums_head,
    length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_END: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the state after every chunk, from the last to the first, and all of du.

    grid: (N * Hkv * blocks of V,). The mirror of chunk_states, with `upper` as there.
    """
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    lane, block = tl.program_id(0) // across, tl.program_id(0) % across
    n, head = lane // heads, lane % heads
    columns_k = tl.arange(0, BLOCK_K)
    columns_u = columns_k + BLOCK_K
    wide: tl.constexpr = KEY_WIDTH > BLOCK_K
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.arange(0, CHUNK)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)

    query += offset(row, query_batch, begin, query_time, head * QUERIES, query_head)
    d_output += offset(row, d_batch, begin, d_time, head * QUERIES, d_head)
    key += offset(row, key_batch, begin, key_time, head, key_head)
    beta += offset(row, beta_batch, begin, beta_time, head, beta_head)
    if HAS_DECAY:
        sums += offset(row, sums_batch, begin, sums_time, head, sums_head)
    reading += kept(row, begin, length, head, heads, KEY_WIDTH)
    d_written += kept(row, begin, length, head, heads, VALUE_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    step = tl.cast(heads, tl.int64)
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_END:
        base = d_end + tl.cast(lane, tl.int64) * state_size
        acc = load_tile(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
    if wide:
        upper = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        if HAS_END:
            upper = load_tile(base, VALUE_WIDTH, columns_u, KEY_WIDTH, columns_v, VALUE_WIDTH)

    count = tl.cdiv(tokens, CHUNK)
    for back in range(0, count):
        c = count - 1 - back
        at = c * CHUNK
        left = tokens - at
        ds = narrow(acc, PRECISION)
        slot = d_states + ((first + c) * step + head) * state_size
        store_tile(slot, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, ds)
        k_at = key + at * tl.cast(key_time, tl.int64)
        k = load_tile(k_at, key_time, rows, left, columns_k, KEY_WIDTH)
        du = dot(k, ds, tl.zeros([CHUNK, BLOCK_V], tl.float32), PRECISION)
        if wide:
            ds = narrow(upper, PRECISION)
            store_tile(slot, VALUE_WIDTH, columns_u, KEY_WIDTH, columns_v, VALUE_WIDTH, ds)
            k = load_tile(k_at, key_time, rows, left, columns_u, KEY_WIDTH)
            du = dot(k, ds, du, PRECISION)
        entering = scale
        if HAS_DECAY:
            sums_at = sums + at * sums_time
            high, low = load_pairs(sums_at, rows, left)
            last = sums_at + tl.minimum(left, CHUNK) * 2 - 2
            last_high, last_low = tl.load(last), tl.load(last + 1)
            du *= tl.exp((last_high - high) + (last_low - low))[:, None]
            whole = tl.exp(last_high + last_low)
            acc *= whole
            if wide:
                upper *= whole
            entering = (tl.exp(high + low) * scale)[:, None]
        place = d_written + at * step * VALUE_WIDTH
        du += load_tile(place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        store_tile(
            place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, narrow(du, PRECISION)
        )
        b = tl.load(
            beta + at * tl.cast(beta_time, tl.int64) + rows * beta_time, mask=rows < left, other=0.0
        )
        du = -du * b[:, None]
        w_at = reading + at * step * KEY_WIDTH
        w = load_tile(w_at, heads * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH)
        acc = dot(tl.trans(w), du, acc, PRECISION)
        if wide:
            w = load_tile(w_at, heads * KEY_WIDTH, rows, left, columns_u, KEY_WIDTH)
            upper = dot(tl.trans(w), du, upper, PRECISION)
        for r in range(0, QUERIES):
            do = load_tile(
                d_output + at * tl.cast(d_time, tl.int64) + r * tl.cast(d_head, tl.int64),
                d_time, rows, left, columns_v, VALUE_WIDTH,
            )  # fmt: skip
            do = do * entering
            q_at = query + at * tl.cast(query_time, tl.int64) + r * tl.cast(query_head, tl.int64)
            q = load_tile(q_at, query_time, rows, left, columns_k, KEY_WIDTH)
            acc = dot(tl.trans(q), do, acc, PRECISION)
            if wide:
                q = load_tile(q_at, query_time, rows, left, columns_u, KEY_WIDTH)
                upper = dot(tl.trans(q), do, upper, PRECISION)

    if HAS_INITIAL:
        base = d_initial + tl.cast(lane, tl.int64) * state_size
        store_tile(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, acc)
        if wide:
            store_tile(base, VALUE_WIDTH, columns_u, KEY_WIDTH, columns_v, VALUE_WIDTH, upper)


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
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    chunk, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    _, row, token, left = locate(chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    inverse += kept(row, token, length, head, heads, CHUNK)
    t = load_tile(inverse, heads * CHUNK, rows, left, rows, CHUNK)
    place = kept(row, token, length, head, heads, VALUE_WIDTH)
    du = load_tile(d_written + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
    beta += offset(row, beta_batch, token, beta_time, head, beta_head)
    b = not_zero(tl.load(beta + rows * beta_time, mask=rows < left, other=0.0))
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    acc = dot(tl.trans(t), du * b[:, None], acc, PRECISION)
    e = load_tile(errors + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
    base = d_beta + offset(row, length, token, 1, block * heads + head, total)
    tl.store(base + rows, tl.sum(e.to(tl.float32) * acc, 1) / b, mask=rows < left)
    store_tile(
        d_value + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH,
        narrow(acc, PRECISION),
    )  # fmt: skip
