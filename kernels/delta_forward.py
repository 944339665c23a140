"""Triton kernels of the delta rule, with or without decay: T, products with T, states, decoding.

Legend as in delta.py: e, the errors that are written with the strength beta, T = (1 + B)^-1 with
B_ij = A_ij beta_j below the diagonal, W = T (exp(G) k). Rows of a tile are the tokens of one chunk;
made before a kernel may return, they take up to 50 registers more. What is kept between kernels is
[B, T, Hkv, D], T itself with D = CHUNK. The state before chunk c of sequence n lies in slot c + n
of `states`, which has one more for the state after.
"""

import triton
import triton.language as tl

from supra.kernels import delta_state, locate, tiles
from supra.kernels.channel_scores import pair_scores
from supra.kernels.decay import decay_between, entering_decay, last_pair, leaving_decay
from supra.kernels.launch import Rows


@triton.jit
def not_zero(strength):
    """0 as 2^-60: column j of T, and so dv_j, keeps a factor beta_j, by which d beta divides."""
    least = 2.0**-60
    return tl.where(tl.abs(strength) < least, least, strength)


@triton.jit
def invert(below, rows, SOLVE: tl.constexpr):
    """(1 + below)^-1 for a matrix [rows, rows] with zeros on and above the diagonal.

    With blocks of `size` on the diagonal inverted, a block of twice the size has -T_22 B_21 T_11 as
    its corner; all corners of a size are one product of whole tiles. It has no loop over rows, and
    is as stable as substitution, where a series in powers of B overflows for keys that are alike.
    """
    i, j = rows[:, None], rows[None, :]
    found = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -below, 0.0))
    size = 2
    while size < rows.shape[0]:
        corner = (i // size != j // size) & (i // (2 * size) == j // (2 * size))
        corners = tl.where(corner, below, 0.0)
        product = tiles.dot(
            corners, found, tl.zeros([rows.shape[0], rows.shape[0]], tl.float32), SOLVE
        )
        found = tiles.dot(-found, product, found, SOLVE)
        size *= 2
    return found


@triton.jit
def chunk_inverse(
    key, beta, sums, inverse, seqs, heads,
    KEY_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, LEVELS: tl.constexpr,
    HAS_DECAY: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """T of every chunk; grid: (chunks, Hkv). With CHANNELS, decay is per key channel."""
    _, _, head, _, row, token, left, _, _ = locate.chunk(seqs, 1, 1, CHUNK)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    key = locate.at(key, row, token, head)
    if CHANNELS:
        sums = locate.dense(sums, row, token, head, heads, seqs, KEY_WIDTH)
        below, _ = pair_scores(
            key, key, sums, None, head, rows, left, KEY_WIDTH, BLOCK_K, LEVELS, False, PRECISION
        )
    else:
        i, j = rows[:, None], rows[None, :]
        below = tiles.products(key, left, key, left, rows, KEY_WIDTH, BLOCK_K, PRECISION)
    beta = locate.at(beta, row, token, head)
    b = tiles.load_numbers(beta, rows, left)
    if HAS_DECAY:
        sums = locate.at(sums, row, token, head)
        below *= decay_between(tiles.load_pairs(sums.data, rows, left))
    if CHANNELS:  # their scores are below the diagonal alone
        below *= not_zero(b)[None, :]
    else:
        below = tl.where(i > j, below * not_zero(b)[None, :], 0.0)
    found = invert(below, rows, SOLVE)
    base = inverse + locate.dense_offset(row, token, seqs.length, head, heads, CHUNK)
    tiles.store(base, heads * CHUNK, rows, left, rows, CHUNK, tiles.narrow(found, PRECISION))


@triton.jit
def chunk_solve(
    inverse, x, sums, found, seqs, heads, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, DECAYED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T x, or T (exp(G) x) where DECAYED; grid: (chunks * blocks, Hkv)."""
    _, _, head, _, row, token, left, rows, columns = locate.chunk(seqs, WIDTH, BLOCK, CHUNK)
    if left <= 0:
        return
    x = locate.at(x, row, token, head)
    tile = tiles.load_rows(x, rows, left, columns, WIDTH)
    if DECAYED:
        sums = locate.at(sums, row, token, head)
        tile = tile * entering_decay(tiles.load_pairs(sums.data, rows, left))[:, None]
    inverse += locate.dense_offset(row, token, seqs.length, head, heads, CHUNK)
    t = tiles.load(inverse, heads * CHUNK, rows, left, rows, CHUNK)
    acc = tiles.dot(t, tile, tl.zeros([CHUNK, BLOCK], tl.float32), PRECISION)
    found += locate.dense_offset(row, token, seqs.length, head, heads, WIDTH)
    tiles.store(found, heads * WIDTH, rows, left, columns, WIDTH, tiles.narrow(acc, PRECISION))


@triton.jit
def chunk_states(
    key, beta, sums, whole, reading, errors, initial, states, end, seqs, heads,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, HAS_DECAY: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States before every chunk and after the last, and the errors e = T v - W S in place of T v.

    grid: (N * Hkv * blocks of V,). Errors are scaled by the decay, since the keys are wider. With
    CHANNELS, decay is per key channel: the keys have that to the end of their chunk in them.
    """
    lane, n, head, _, _, columns_k, columns_v = locate.block_of_state(
        heads, BLOCK_K, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    rows = tl.arange(0, CHUNK)
    row, begin, tokens, first = locate.sequence(n, seqs, CHUNK)
    key = locate.at(key, row, begin, head)
    beta = locate.at(beta, row, begin, head)
    if HAS_DECAY:
        sums = locate.at(sums, row, begin, head)
    reading += locate.dense_offset(row, begin, seqs.length, head, heads, KEY_WIDTH)
    errors += locate.dense_offset(row, begin, seqs.length, head, heads, VALUE_WIDTH)
    state_size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    states += locate.slot_offset(first + n, head, heads, state_size)
    step = tl.cast(heads, tl.int64)
    s = delta_state.zeros(BLOCK_K, BLOCK_V)
    if initial is not None:
        base = initial + lane * state_size
        s = delta_state.load(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)

    for at in range(0, tokens, CHUNK):
        left = tokens - at
        w_at = Rows(reading + at * step * KEY_WIDTH, 0, heads * KEY_WIDTH, 0)
        place = errors + at * step * VALUE_WIDTH
        e = tiles.load(place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH)
        e -= delta_state.store_and_read(
            states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, s, w_at, left, rows, PRECISION
        )
        states += step * state_size
        kept = tiles.narrow(e, PRECISION)
        tiles.store(place, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, kept)
        b = tiles.load_numbers(locate.skip(beta, tl.cast(at, tl.int64)), rows, left)
        if HAS_DECAY:
            sums_at = locate.skip(sums, at)
            own, last = tiles.load_pairs(sums_at.data, rows, left), last_pair(sums_at, left, CHUNK)
            b *= leaving_decay(own, last)
            s = delta_state.scale(s, entering_decay(last), columns_k, KEY_WIDTH)
        if CHANNELS:
            whole_at = whole + locate.slot_offset(first + at // CHUNK, head, heads, KEY_WIDTH)
            s = delta_state.scale_channels(s, whole_at, columns_k, KEY_WIDTH)
        k_at = locate.skip(key, tl.cast(at, tl.int64))
        e *= b[:, None]
        s = delta_state.write(s, k_at, left, rows, columns_k, e, KEY_WIDTH, PRECISION)

    delta_state.store(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, s, PRECISION)
    if end is not None:
        base = end + lane * state_size
        delta_state.store(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, s, "float32")
