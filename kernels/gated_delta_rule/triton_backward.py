"""Triton kernels of the gradients of the gated delta rule; legend as in triton_forward.py.

u = beta e is what a token writes. `d_written` is the gradient of u that comes from the outputs and
from the state after the chunk; with it dv = T^T (beta du), and dv is the gradient of all that e is
made of: dB = -dv e^T, d(exp(G) k) = -dv S^T. heads = Hkv throughout.

The gradient of G_i is the sum of x_ij over its row less that over its column, with x_ij = y dy for
every product y that D_ij scales. Both sums are taken of the same numbers: row sums as q . dq and
column sums as v . dv, which agree but for their rounding, would lose what is left of them where the
decay is strong.
"""

import triton
import triton.language as tl

from supra.kernels.gated_delta_rule.triton_forward import decay_between, kept, locate
from supra.kernels.tiles import dot, load_pairs, load_tile, narrow, offset, sequence, store_tile


@triton.jit
def chunk_d_written(
    query, key, d_output, sums, d_written, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    sums_batch, sums_time, sums_head, sequences, length, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
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
        high, low = load_pairs(sums, rows, left)
        scores *= decay_between(high, low) * scale
        scores = tl.where(rows[:, None] <= rows[None, :], scores, 0.0)
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
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr,
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
        sums_at = sums + at * sums_time
        high, low = load_pairs(sums_at, rows, left)
        last = sums_at + tl.minimum(left, CHUNK) * 2 - 2
        last_high, last_low = tl.load(last), tl.load(last + 1)
        du *= tl.exp((last_high - high) + (last_low - low))[:, None]
        place = d_written + at * step * VALUE_WIDTH
        du += load_tile(place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        store_tile(
            place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, narrow(du, PRECISION)
        )
        b = tl.load(
            beta + at * tl.cast(beta_time, tl.int64) + rows * beta_time, mask=rows < left, other=0.0
        )
        du = -du * b[:, None]
        whole = tl.exp(last_high + last_low)
        w_at = reading + at * step * KEY_WIDTH
        w = load_tile(w_at, heads * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH)
        acc = dot(tl.trans(w), du, acc * whole, PRECISION)
        if wide:
            w = load_tile(w_at, heads * KEY_WIDTH, rows, left, columns_u, KEY_WIDTH)
            upper = dot(tl.trans(w), du, upper * whole, PRECISION)
        entering = tl.exp(high + low) * scale
        for r in range(0, QUERIES):
            do = load_tile(
                d_output + at * tl.cast(d_time, tl.int64) + r * tl.cast(d_head, tl.int64),
                d_time, rows, left, columns_v, VALUE_WIDTH,
            )  # fmt: skip
            do = do * entering[:, None]
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
    """dv, and e . du of every block of channels, [blocks, Hkv, B * T]: a part of d beta.

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
    e = load_tile(errors + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
    base = d_beta + offset(row, length, token, 1, block * heads + head, total)
    tl.store(base + rows, tl.sum(e.to(tl.float32) * du.to(tl.float32), 1), mask=rows < left)
    beta += offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tl.load(beta + rows * beta_time, mask=rows < left, other=0.0)
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    acc = dot(tl.trans(t), du * b[:, None], acc, PRECISION)
    store_tile(
        d_value + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH,
        narrow(acc, PRECISION),
    )  # fmt: skip


@triton.jit
def chunk_d_overlap(
    query, key, beta, d_output, sums, errors, d_value, d_overlap, d_beta, key_products,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    beta_batch, beta_time, beta_head, sums_batch, sums_time, sums_head,
    sequences, length, heads, total, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, HAS_DECAY: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of k . k with its transpose added, laid out as T, and its part of d beta.

    grid: (chunks, Hkv). key_products, block 0: the part of -dG that stays within the chunk.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    _, row, token, left = locate(chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    i, j = rows[:, None], rows[None, :]
    key += offset(row, key_batch, token, key_time, head, key_head)
    place = kept(row, token, length, head, heads, VALUE_WIDTH)
    products = tl.zeros([CHUNK, CHUNK], tl.float32)  # dv_i . e_j
    transposed = tl.zeros([CHUNK, CHUNK], tl.float32)  # e_i . dv_j
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns = v0 + tl.arange(0, BLOCK_V)
        dv = load_tile(d_value + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
        e = load_tile(errors + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
        products = dot(dv, tl.trans(e), products, PRECISION)
        transposed = dot(e, tl.trans(dv), transposed, PRECISION)
    sums += offset(row, sums_batch, token, sums_time, head, sums_head)
    high, low = load_pairs(sums, rows, left)
    beta += offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tl.load(beta + rows * beta_time, mask=rows < left, other=0.0)
    decay = decay_between(high, low)
    products = tl.where(i > j, products * decay * b[None, :], 0.0)
    transposed = tl.where(i < j, transposed * decay, 0.0)
    base = d_overlap + kept(row, token, length, head, heads, CHUNK)
    store_tile(
        base, heads * CHUNK, rows, left, rows, CHUNK,
        narrow(products + transposed * b[:, None], PRECISION),
    )  # fmt: skip

    overlap = tl.zeros([CHUNK, CHUNK], tl.float32)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns = k0 + tl.arange(0, BLOCK_K)
        k = load_tile(key, key_time, rows, left, columns, KEY_WIDTH)
        overlap = dot(k, tl.trans(k), overlap, PRECISION)
    later = tl.sum(transposed * overlap, 1)
    place_1 = offset(row, length, token, 1, head, total)
    tl.store(d_beta + place_1 + rows, -later, mask=rows < left)
    if HAS_DECAY:
        d_sums = b * later - tl.sum(products * overlap, 1)
        for r in range(0, QUERIES):
            query_at, query_lane = query, head * QUERIES + r
            query_at += offset(row, query_batch, token, query_time, query_lane, query_head)
            d_at = d_output + offset(row, d_batch, token, d_time, query_lane, d_head)
            scores = tl.zeros([CHUNK, CHUNK], tl.float32)
            d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
            for k0 in range(0, KEY_WIDTH, BLOCK_K):
                columns = k0 + tl.arange(0, BLOCK_K)
                q = load_tile(query_at, query_time, rows, left, columns, KEY_WIDTH)
                k = load_tile(key, key_time, rows, left, columns, KEY_WIDTH)
                scores = dot(q, tl.trans(k), scores, PRECISION)
            for v0 in range(0, VALUE_WIDTH, BLOCK_V):
                columns = v0 + tl.arange(0, BLOCK_V)
                do = load_tile(d_at, d_time, rows, left, columns, VALUE_WIDTH)
                e = load_tile(errors + place, heads * VALUE_WIDTH, rows, left, columns, VALUE_WIDTH)
                d_scores = dot(do, tl.trans(e), d_scores, PRECISION)
            scores *= d_scores * decay_between(high, low) * (b * scale)[None, :]
            scores = tl.where(i > j, scores, 0.0)
            d_sums += tl.sum(scores, 1) - tl.sum(scores, 0)
        tl.store(key_products + place_1 + rows, -d_sums, mask=rows < left)


@triton.jit
def chunk_d_query(
    query, key, beta, d_output, sums, errors, states, d_query, query_products,
    cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    beta_batch, beta_time, beta_head, sums_batch, sums_time, sums_head,
    sequences, length, heads, total, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and the part of q . dq that comes through the state, [blocks, Hq, B * T].

    grid: (chunks * blocks of K, Hq).
    """
    across: tl.constexpr = (KEY_WIDTH + BLOCK_K - 1) // BLOCK_K
    chunk, block, query_at = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    head = query_at // QUERIES
    n, row, token, left = locate(chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    columns_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    d_output += offset(row, d_batch, token, d_time, query_at, d_head)
    errors += kept(row, token, length, head, heads, VALUE_WIDTH)
    states += (tl.cast(chunk + n, tl.int64) * heads + head) * KEY_WIDTH * VALUE_WIDTH
    acc = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns_v = v0 + tl.arange(0, BLOCK_V)
        do = load_tile(d_output, d_time, rows, left, columns_v, VALUE_WIDTH)
        s = load_tile(states, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
        acc = dot(do, tl.trans(s), acc, PRECISION)
        e = load_tile(errors, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        d_scores = dot(do, tl.trans(e), d_scores, PRECISION)
    sums += offset(row, sums_batch, token, sums_time, head, sums_head)
    high, low = load_pairs(sums, rows, left)
    acc *= (tl.exp(high + low) * scale)[:, None]
    query += offset(row, query_batch, token, query_time, query_at, query_head)
    q = load_tile(query, query_time, rows, left, columns_k, KEY_WIDTH)
    base = query_products + offset(row, length, token, 1, block * heads * QUERIES + query_at, total)
    tl.store(base + rows, tl.sum(q.to(tl.float32) * acc, 1), mask=rows < left)

    beta += offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tl.load(beta + rows * beta_time, mask=rows < left, other=0.0)
    d_scores *= decay_between(high, low) * (b * scale)[None, :]
    d_scores = tl.where(rows[:, None] >= rows[None, :], d_scores, 0.0)
    key += offset(row, key_batch, token, key_time, head, key_head)
    k = load_tile(key, key_time, rows, left, columns_k, KEY_WIDTH)
    acc = dot(d_scores, k, acc, PRECISION)
    d_query += kept(row, token, length, query_at, heads * QUERIES, KEY_WIDTH)
    store_tile(d_query, heads * QUERIES * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH, acc)


@triton.jit
def chunk_d_key(
    query, key, beta, d_output, sums, errors, states, d_states, d_value, d_overlap, d_key,
    key_products, carried, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head, d_batch, d_time, d_head,
    beta_batch, beta_time, beta_head, sums_batch, sums_time, sums_head,
    sequences, length, heads, total, chunks, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk; grid: (chunks * blocks of K, Hkv).

    key_products [blocks, Hkv, B * T]: the part of -dG through the states before and after the
    chunk, added to what chunk_d_overlap left in block 0; carried [blocks, Hkv, chunks]: <S, dS>
    after the chunk, the gradient of the sum of all its logs.
    """
    across: tl.constexpr = (KEY_WIDTH + BLOCK_K - 1) // BLOCK_K
    chunk, block, head = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    n, row, token, left = locate(chunk, cu_seqlens, chunk_offsets, sequences, length, CHUNK, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    columns_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    key += offset(row, key_batch, token, key_time, head, key_head)
    place = kept(row, token, length, head, heads, VALUE_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += (tl.cast(chunk + n, tl.int64) * heads + head) * state_size
    d_states += (tl.cast(chunk, tl.int64) * heads + head) * state_size
    read = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    acc = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    along = tl.zeros([BLOCK_K], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns_v = v0 + tl.arange(0, BLOCK_V)
        dv = load_tile(d_value + place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        s = load_tile(states, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
        read = dot(dv, tl.trans(s), read, PRECISION)
        e = load_tile(errors + place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        ds = load_tile(d_states, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)
        acc = dot(e, tl.trans(ds), acc, PRECISION)
        along += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
    sums += offset(row, sums_batch, token, sums_time, head, sums_head)
    high, low = load_pairs(sums, rows, left)
    last = sums + tl.minimum(left, CHUNK) * 2 - 2
    last_high, last_low = tl.load(last), tl.load(last + 1)
    beta += offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tl.load(beta + rows * beta_time, mask=rows < left, other=0.0)
    k = load_tile(key, key_time, rows, left, columns_k, KEY_WIDTH)
    read *= tl.exp(high + low)[:, None]
    acc *= (b * tl.exp((last_high - high) + (last_low - low)))[:, None]
    leaving = k.to(tl.float32) * acc
    products = tl.sum(leaving + k.to(tl.float32) * read, 1)
    base = key_products + offset(row, length, token, 1, block * heads + head, total)
    products += tl.load(base + rows, mask=(rows < left) & (block == 0), other=0.0)
    tl.store(base + rows, products, mask=rows < left)
    carried += offset(0, 0, chunk, 1, block * heads + head, chunks)
    tl.store(carried, tl.sum(leaving) + tl.exp(last_high + last_low) * tl.sum(along, 0))

    d_overlap += kept(row, token, length, head, heads, CHUNK)
    x = load_tile(d_overlap, heads * CHUNK, rows, left, rows, CHUNK)
    acc = dot(x, -k, acc - read, PRECISION)
    for r in range(0, QUERIES):
        query_lane = head * QUERIES + r
        d_at = d_output + offset(row, d_batch, token, d_time, query_lane, d_head)
        d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)  # [key token, query token]
        for v0 in range(0, VALUE_WIDTH, BLOCK_V):
            columns_v = v0 + tl.arange(0, BLOCK_V)
            do = load_tile(d_at, d_time, rows, left, columns_v, VALUE_WIDTH)
            e = load_tile(errors + place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
            d_scores = dot(e, tl.trans(do), d_scores, PRECISION)
        d_scores *= decay_between(high, low) * (b * scale)[:, None]
        d_scores = tl.where(rows[:, None] <= rows[None, :], d_scores, 0.0)
        query_at = query + offset(row, query_batch, token, query_time, query_lane, query_head)
        q = load_tile(query_at, query_time, rows, left, columns_k, KEY_WIDTH)
        acc = dot(d_scores, q, acc, PRECISION)
    d_key += kept(row, token, length, head, heads, KEY_WIDTH)
    store_tile(d_key, heads * KEY_WIDTH, rows, left, columns_k, KEY_WIDTH, acc)
