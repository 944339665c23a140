"""Triton kernels of the gated delta rule: T, products with T, states, outputs, the recurrent form.

Legend as in torch.py: e, the errors that are written with the strength beta, T = (1 + B)^-1 with
B_ij = D_ij (k_i . k_j) beta_j below the diagonal, W = T (exp(G) k). Rows of a tile are the tokens
of one chunk. What is kept between kernels is [B, T, Hkv, D], T itself with D = CHUNK. The state
before chunk c of sequence n lies in slot c + n of `states`, which has one more for the state after.
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
def locate(
    chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK: tl.constexpr, PACKED: tl.constexpr
):
    """(sequence, row of the batch, first token, tokens from there on) of a chunk."""
    n = sequence_of(chunk, chunk_offsets, sequences, length, CHUNK, PACKED)
    row, begin, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)
    at = (chunk - first) * CHUNK
    return n, row, begin + at, tokens - at


@triton.jit
def kept(row, token, length, head, heads, WIDTH: tl.constexpr):
    """Place of a token of a head in a contiguous [B, T, heads, WIDTH], int64."""
    return ((row * tl.cast(length, tl.int64) + token) * heads + head) * WIDTH


@triton.jit
def decay_between(high, low):
    """exp(-|G_i - G_j|): D below the diagonal, its transpose above, and never more than 1."""
    return tl.exp(-tl.abs((high[:, None] - high[None, :]) + (low[:, None] - low[None, :])))


@triton.jit
def not_zero(strength):
    """0 as 2^-60: column j of T, and so dv_j, keeps a factor beta_j, by which d beta divides."""
    least = 2.0**-60
    return tl.where(tl.abs(strength) < least, least, strength)


@triton.jit
def chunk_inverse(
    key, beta, sums, inverse, cu_seqlens, chunk_offsets,
    key_batch, key_time, key_head, beta_batch, beta_time, beta_head,
    sums_batch, sums_time, sums_head, sequences, length, heads,
    KEY_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_DECAY: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """T of every chunk; grid: (chunks, Hkv).

    With blocks of `size` on the diagonal inverted, a block of twice the size has -T_22 B_21 T_11 as
    its corner; all corners of a size are one product of whole tiles. It has no loop over rows, and
    is as stable as substitution, where a series in powers of B overflows for keys that are alike.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    _, row, token, left = locate(chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    i, j = rows[:, None], rows[None, :]
    key += offset(row, key_batch, token, key_time, head, key_head)
    below = tl.zeros([CHUNK, CHUNK], tl.float32)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns = k0 + tl.arange(0, BLOCK_K)
        k = load_tile(key, key_time, rows, left, columns, KEY_WIDTH)
        below = dot(k, tl.trans(k), below, PRECISION)
    beta += offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tl.load(beta + rows * beta_time, mask=rows < left, other=0.0)
    if HAS_DECAY:
        sums += offset(row, sums_batch, token, sums_time, head, sums_head)
        high, low = load_pairs(sums, rows, left)
        below *= decay_between(high, low)
    below = tl.where(i > j, below * not_zero(b)[None, :], 0.0)

    found = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -below, 0.0))
    size = 2
    while size < CHUNK:
        corner = (i // size != j // size) & (i // (2 * size) == j // (2 * size))
        corners = tl.where(corner, below, 0.0)
        product = dot(corners, found, tl.zeros([CHUNK, CHUNK], tl.float32), SOLVE)
        found = dot(-found, product, found, SOLVE)
        size *= 2
    base = inverse + kept(row, token, length, head, heads, CHUNK)
    store_tile(base, heads * CHUNK, rows, left, rows, CHUNK, narrow(found, PRECISION))


@triton.jit
def chunk_solve(
    inverse, x, sums, found, cu_seqlens, chunk_offsets, x_batch, x_time, x_head,
    sums_batch, sums_time, sums_head, sequences, length, heads,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DECAYED: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T x, or T (exp(G) x) where DECAYED; grid: (chunks * blocks, Hkv)."""
    across: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    chunk, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    _, row, token, left = locate(chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    x += offset(row, x_batch, token, x_time, head, x_head)
    tile = load_tile(x, x_time, rows, left, columns, WIDTH)
    if DECAYED:
        sums += offset(row, sums_batch, token, sums_time, head, sums_head)
        high, low = load_pairs(sums, rows, left)
        tile = tile * tl.exp(high + low)[:, None]
    inverse += kept(row, token, length, head, heads, CHUNK)
    t = load_tile(inverse, heads * CHUNK, rows, left, rows, CHUNK)
    acc = dot(t, tile, tl.zeros([CHUNK, BLOCK], tl.float32), PRECISION)
    found += kept(row, token, length, head, heads, WIDTH)
    store_tile(found, heads * WIDTH, rows, left, columns, WIDTH, narrow(acc, PRECISION))


@triton.jit
def chunk_states(
    key, beta, sums, reading, errors, initial, states, end, cu_seqlens, chunk_offsets,
    key_batch, key_time, key_head, beta_batch, beta_time, beta_head,
    sums_batch, sums_time, sums_head, length, heads,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_END: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """States before every chunk and after the last, and the errors e = T v - W S in place of T v.

    grid: (N * Hkv * blocks of V,). Every error needs all channels of the keys, so a program has
    them all: BLOCK_K, and as many again in `upper` where keys are wider. As one block they would
    spill 100 bytes on sm_100. Errors are scaled by the decay and not the keys, which are wider.
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

    key += offset(row, key_batch, begin, key_time, head, key_head)
    beta += offset(row, beta_batch, begin, beta_time, head, beta_head)
    if HAS_DECAY:
        sums += offset(row, sums_batch, begin, sums_time, head, sums_head)
    reading += kept(row, begin, length, head, heads, KEY_WIDTH)
    errors += kept(row, begin, length, head, heads, VALUE_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += (tl.cast(first + n, tl.int64) * heads + head) * state_size
    step = tl.cast(heads, tl.int64)
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_INITIAL:
        base = initial + tl.cast(lane, tl.int64) * state_size
        acc = load_tile(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
    if wide:
        upper = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        if HAS_INITIAL:
            upper = load_tile(base, VALUE_WIDTH, columns_u, KEY_WIDTH, columns_v, VALUE_WIDTH)

    for at in range(0, tokens, CHUNK):
        left = tokens - at
        w_at = reading + at * step * KEY_WIDTH
        place = errors + at * step * VALUE_WIDTH
        e = load_tile(place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        s = narrow(acc, PRECISION)
        store_tile(states, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, s)
        w = load_tile(w_at, heads * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH)
        e = e - dot(w, s, tl.zeros([CHUNK, BLOCK_V], tl.float32), PRECISION)
        if wide:
            s = narrow(upper, PRECISION)
            store_tile(states, VALUE_WIDTH, columns_u, KEY_WIDTH, columns_v, VALUE_WIDTH, s)
            w = load_tile(w_at, heads * KEY_WIDTH, rows, left, columns_u, KEY_WIDTH)
            e -= dot(w, s, tl.zeros([CHUNK, BLOCK_V], tl.float32), PRECISION)
        states += step * state_size
        store_tile(
            place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, narrow(e, PRECISION)
        )
        b = tl.load(
            beta + at * tl.cast(beta_time, tl.int64) + rows * beta_time, mask=rows < left, other=0.0
        )
        if HAS_DECAY:
            sums_at = sums + at * sums_time
            high, low = load_pairs(sums_at, rows, left)
            last = sums_at + tl.minimum(left, CHUNK) * 2 - 2
            last_high, last_low = tl.load(last), tl.load(last + 1)
            b *= tl.exp((last_high - high) + (last_low - low))
            whole = tl.exp(last_high + last_low)
            acc *= whole
            if wide:
                upper *= whole
        e *= b[:, None]
        k_at = key + at * tl.cast(key_time, tl.int64)
        k = load_tile(k_at, key_time, rows, left, columns_k, KEY_WIDTH)
        acc = dot(tl.trans(k), e, acc, PRECISION)
        if wide:
            k = load_tile(k_at, key_time, rows, left, columns_u, KEY_WIDTH)
            upper = dot(tl.trans(k), e, upper, PRECISION)

    store_tile(
        states, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, narrow(acc, PRECISION)
    )
    if wide:
        s = narrow(upper, PRECISION)
        store_tile(states, VALUE_WIDTH, columns_u, KEY_WIDTH, columns_v, VALUE_WIDTH, s)
    if HAS_END:
        base = end + tl.cast(lane, tl.int64) * state_size
        store_tile(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, acc)
        if wide:
            store_tile(base, VALUE_WIDTH, columns_u, KEY_WIDTH, columns_v, VALUE_WIDTH, upper)


@triton.jit
def chunk_output(
    query, key, beta, sums, errors, states, output, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    beta_batch, beta_time, beta_head, sums_batch, sums_time, sums_head,
    sequences, length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs; heads = Hkv. grid: (chunks * blocks of V, Hq)."""
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    chunk, block, query_at = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    head = query_at // QUERIES
    n, row, token, left = locate(chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    query += offset(row, query_batch, token, query_time, query_at, query_head)
    key += offset(row, key_batch, token, key_time, head, key_head)
    states += (tl.cast(chunk + n, tl.int64) * heads + head) * KEY_WIDTH * VALUE_WIDTH
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns_k = k0 + tl.arange(0, BLOCK_K)
        q = load_tile(query, query_time, rows, left, columns_k, KEY_WIDTH)
        k = load_tile(key, key_time, rows, left, columns_k, KEY_WIDTH)
        s = load_tile(states, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
        acc = dot(q, s, acc, PRECISION)
        scores = dot(q, tl.trans(k), scores, PRECISION)
    beta += offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tl.load(beta + rows * beta_time, mask=rows < left, other=0.0)
    if HAS_DECAY:
        sums += offset(row, sums_batch, token, sums_time, head, sums_head)
        high, low = load_pairs(sums, rows, left)
        acc *= tl.exp(high + low)[:, None]
        scores *= decay_between(high, low)
    scores = tl.where(rows[:, None] >= rows[None, :], scores * b[None, :], 0.0)
    errors += kept(row, token, length, head, heads, VALUE_WIDTH)
    e = load_tile(errors, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
    acc = dot(scores, e, acc, PRECISION)
    output += kept(row, token, length, query_at, heads * QUERIES, VALUE_WIDTH)
    store_tile(
        output, heads * QUERIES * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, acc * scale
    )


@triton.jit
def recurrent_steps(
    query, key, value, beta, log_decay, state, output,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, beta_batch, beta_time, beta_head,
    decay_batch, decay_time, decay_head, length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """The recurrence token by token with the state in registers, from where it is written back.

    grid: (N * Hkv * blocks of V,); heads = Hkv.
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
    output += kept(n, 0, length, head * QUERIES, heads * QUERIES, VALUE_WIDTH) + columns_v
    state += tl.cast(lane, tl.int64) * KEY_WIDTH * VALUE_WIDTH
    s = load_tile(state, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
    for t in range(0, length):
        k = tl.load(key + t * tl.cast(key_time, tl.int64), mask=valid_k, other=0.0).to(tl.float32)
        v = tl.load(value + t * tl.cast(value_time, tl.int64), mask=valid_v, other=0.0)
        b = tl.load(beta + offset(n, beta_batch, t, beta_time, head, beta_head)).to(tl.float32)
        if HAS_DECAY:
            g = tl.load(log_decay + offset(n, decay_batch, t, decay_time, head, decay_head))
            s *= tl.exp(g.to(tl.float32))
        written = b * (v.to(tl.float32) - tl.sum(k[:, None] * s, 0))
        s += k[:, None] * written[None, :]
        for r in range(0, QUERIES):
            base = query + t * tl.cast(query_time, tl.int64) + r * query_head
            q = tl.load(base, mask=valid_k, other=0.0).to(tl.float32)
            base = output + (t * tl.cast(heads, tl.int64) * QUERIES + r) * VALUE_WIDTH
            tl.store(base, scale * tl.sum(q[:, None] * s, 0), mask=valid_v)
    store_tile(state, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, s)
