"""Triton kernels of the gated delta rule: T, products with T, states, outputs, the recurrent form.

Legend as in torch.py: e, the errors that are written with the strength beta, T = (1 + B)^-1 with
B_ij = D_ij (k_i . k_j) beta_j below the diagonal, W = T (exp(G) k). Rows of a tile are the tokens
of one chunk; made before a kernel may return, they take up to 50 registers more. What is kept
between kernels is [B, T, Hkv, D], T itself with D = CHUNK. The state before chunk c of sequence n
lies in slot c + n of `states`, which has one more for the state after.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.decay import difference, entering_decay, last_pair, leaving_decay
from supra.kernels.gated_delta_rule import triton_state


@triton.jit
def decay_between(own):
    """exp(-|G_i - G_j|): D below the diagonal, its transpose above, and never more than 1.

    own: the pairs of sums at the tokens of the chunk.
    """
    return tl.exp(-tl.abs(difference(own, own)))


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
    _, _, head, _, row, token, left, _, _ = locate.chunk(
        cu_seqlens, chunk_offsets, sequences, length, 1, 1, CHUNK, PACKED
    )
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    i, j = rows[:, None], rows[None, :]
    key += locate.offset(row, key_batch, token, key_time, head, key_head)
    below = tiles.products(
        key, key_time, left, key, key_time, left, rows, KEY_WIDTH, BLOCK_K, PRECISION
    )
    beta += locate.offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tiles.load_vector(beta, beta_time, rows, left)
    if HAS_DECAY:
        sums += locate.offset(row, sums_batch, token, sums_time, head, sums_head)
        below *= decay_between(tiles.load_pairs(sums, rows, left))
    below = tl.where(i > j, below * not_zero(b)[None, :], 0.0)

    found = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -below, 0.0))
    size = 2
    while size < CHUNK:
        corner = (i // size != j // size) & (i // (2 * size) == j // (2 * size))
        corners = tl.where(corner, below, 0.0)
        product = tiles.dot(corners, found, tl.zeros([CHUNK, CHUNK], tl.float32), SOLVE)
        found = tiles.dot(-found, product, found, SOLVE)
        size *= 2
    base = inverse + locate.dense_offset(row, token, length, head, heads, CHUNK)
    tiles.store(base, heads * CHUNK, rows, left, rows, CHUNK, tiles.narrow(found, PRECISION))


@triton.jit
def chunk_solve(
    inverse, x, sums, found, cu_seqlens, chunk_offsets, x_batch, x_time, x_head,
    sums_batch, sums_time, sums_head, sequences, length, heads,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DECAYED: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T x, or T (exp(G) x) where DECAYED; grid: (chunks * blocks, Hkv)."""
    _, _, head, _, row, token, left, rows, columns = locate.chunk(
        cu_seqlens, chunk_offsets, sequences, length, WIDTH, BLOCK, CHUNK, PACKED
    )
    if left <= 0:
        return
    x += locate.offset(row, x_batch, token, x_time, head, x_head)
    tile = tiles.load(x, x_time, rows, left, columns, WIDTH)
    if DECAYED:
        sums += locate.offset(row, sums_batch, token, sums_time, head, sums_head)
        tile = tile * entering_decay(tiles.load_pairs(sums, rows, left))[:, None]
    inverse += locate.dense_offset(row, token, length, head, heads, CHUNK)
    t = tiles.load(inverse, heads * CHUNK, rows, left, rows, CHUNK)
    acc = tiles.dot(t, tile, tl.zeros([CHUNK, BLOCK], tl.float32), PRECISION)
    found += locate.dense_offset(row, token, length, head, heads, WIDTH)
    tiles.store(found, heads * WIDTH, rows, left, columns, WIDTH, tiles.narrow(acc, PRECISION))


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

    grid: (N * Hkv * blocks of V,). Errors are scaled by the decay, since the keys are wider.
    """
    lane, n, head, _, _, columns_k, columns_v = locate.block_of_state(
        heads, BLOCK_K, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    rows = tl.arange(0, CHUNK)
    row, begin, tokens, first = locate.sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)
    key += locate.offset(row, key_batch, begin, key_time, head, key_head)
    beta += locate.offset(row, beta_batch, begin, beta_time, head, beta_head)
    if HAS_DECAY:
        sums += locate.offset(row, sums_batch, begin, sums_time, head, sums_head)
    reading += locate.dense_offset(row, begin, length, head, heads, KEY_WIDTH)
    errors += locate.dense_offset(row, begin, length, head, heads, VALUE_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += locate.slot_offset(first + n, head, heads, state_size)
    step = tl.cast(heads, tl.int64)
    s = triton_state.zeros(BLOCK_K, BLOCK_V)
    if HAS_INITIAL:
        base = initial + lane * state_size
        s = triton_state.load(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)

    for at in range(0, tokens, CHUNK):
        left = tokens - at
        w_at, place = reading + at * step * KEY_WIDTH, errors + at * step * VALUE_WIDTH
        e = tiles.load(place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        e -= triton_state.store_and_read(
            states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, s,
            w_at, heads * KEY_WIDTH, left, rows, PRECISION,
        )  # fmt: skip
        states += step * state_size
        kept = tiles.narrow(e, PRECISION)
        tiles.store(place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, kept)
        b = tiles.load_vector(beta + at * tl.cast(beta_time, tl.int64), beta_time, rows, left)
        if HAS_DECAY:
            sums_at = sums + at * sums_time
            own, last = tiles.load_pairs(sums_at, rows, left), last_pair(sums_at, left, CHUNK)
            b *= leaving_decay(own, last)
            s = triton_state.scale(s, entering_decay(last), columns_k, KEY_WIDTH)
        k_at = key + at * tl.cast(key_time, tl.int64)
        e *= b[:, None]
        s = triton_state.write(s, k_at, key_time, left, rows, columns_k, e, KEY_WIDTH, PRECISION)

    triton_state.store(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, s, PRECISION)
    if HAS_END:
        base = end + lane * state_size
        triton_state.store(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, s, "float32")


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
    chunk, block, query_at, n, row, token, left, _, _ = locate.chunk(
        cu_seqlens, chunk_offsets, sequences, length, VALUE_WIDTH, BLOCK_V, CHUNK, PACKED
    )
    head = query_at // QUERIES
    if left <= 0:
        return
    rows, columns_v = tl.arange(0, CHUNK), block * BLOCK_V + tl.arange(0, BLOCK_V)
    query += locate.offset(row, query_batch, token, query_time, query_at, query_head)
    key += locate.offset(row, key_batch, token, key_time, head, key_head)
    states += locate.slot_offset(chunk + n, head, heads, KEY_WIDTH * VALUE_WIDTH)
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns_k = k0 + tl.arange(0, BLOCK_K)
        q = tiles.load(query, query_time, rows, left, columns_k, KEY_WIDTH)
        k = tiles.load(key, key_time, rows, left, columns_k, KEY_WIDTH)
        s = tiles.load_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
        acc = tiles.dot(q, s, acc, PRECISION)
        scores = tiles.dot(q, tl.trans(k), scores, PRECISION)
    beta += locate.offset(row, beta_batch, token, beta_time, head, beta_head)
    b = tiles.load_vector(beta, beta_time, rows, left)
    if HAS_DECAY:
        sums += locate.offset(row, sums_batch, token, sums_time, head, sums_head)
        own = tiles.load_pairs(sums, rows, left)
        acc *= entering_decay(own)[:, None]
        scores *= decay_between(own)
    scores = tl.where(rows[:, None] >= rows[None, :], scores * b[None, :], 0.0)
    errors += locate.dense_offset(row, token, length, head, heads, VALUE_WIDTH)
    e = tiles.load(errors, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
    acc = tiles.dot(scores, e, acc, PRECISION)
    output += locate.dense_offset(row, token, length, query_at, heads * QUERIES, VALUE_WIDTH)
    tiles.store(
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
    lane, n, head, _, block, columns_k, _ = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)  # made by locate, 8 more registers
    query += locate.offset(n, query_batch, 0, query_time, head * QUERIES, query_head) + columns_k
    key += locate.offset(n, key_batch, 0, key_time, head, key_head) + columns_k
    value += locate.offset(n, value_batch, 0, value_time, head, value_head) + columns_v
    output += (
        locate.dense_offset(n, 0, length, head * QUERIES, heads * QUERIES, VALUE_WIDTH) + columns_v
    )
    state += lane * (KEY_WIDTH * VALUE_WIDTH)
    s = tiles.load_state(state, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
    for t in range(0, length):
        k = tiles.load_token(key, key_time, t, columns_k, KEY_WIDTH)
        v_at = value + t * tl.cast(value_time, tl.int64)
        v = tl.load(v_at, mask=columns_v < VALUE_WIDTH, other=0.0)  # made float32 only where used
        b = tl.load(beta + locate.offset(n, beta_batch, t, beta_time, head, beta_head))
        if HAS_DECAY:
            g = tl.load(log_decay + locate.offset(n, decay_batch, t, decay_time, head, decay_head))
            s *= tl.exp(g.to(tl.float32))
        written = b.to(tl.float32) * (v.to(tl.float32) - tl.sum(k[:, None] * s, 0))
        s += k[:, None] * written[None, :]
        for r in range(0, QUERIES):
            at = query + r * tl.cast(query_head, tl.int64)
            q = tiles.load_token(at, query_time, t, columns_k, KEY_WIDTH)
            base = output + locate.dense_offset(0, t, length, r, heads * QUERIES, VALUE_WIDTH)
            tl.store(base, scale * tl.sum(q[:, None] * s, 0), mask=columns_v < VALUE_WIDTH)
    tiles.store_state(state, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, s)
