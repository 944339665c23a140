"""The states of a chunk as the root of their recurrence: Newton's method in registers.

A tile is CHUNK tokens of a block of the state, [CHUNK, BLOCK_K, BLOCK_V], and what belongs to a
key, to a value or to a token alone has ones for the rest. The numbers of a state do not mix, so
that a Jacobian is one number each, and a sweep is a scan of affine maps along the first axis, which
lies in one thread's registers.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles


@triton.jit
def load_block(base, row_stride, row_end, column_end, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS], in float32; zero past the ends."""
    place, mask = _places(row_stride, row_end, column_end, ROWS, COLUMNS)
    x = tl.load(base + place, mask=mask, other=0.0).to(tl.float32)
    return tl.reshape(x, [ROWS, COLUMNS])


@triton.jit
def load_tokens(x, at, end, column_end, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same of the tokens from `at` on of x, launch.Rows; end: tokens from there on."""
    x = locate.skip(x, tl.cast(at, tl.int64))
    return load_block(x.data, x.time, end, column_end, ROWS, COLUMNS)


@triton.jit
def store_block(base, row_stride, row_end, column_end, x):
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    place, mask = _places(row_stride, row_end, column_end, ROWS, COLUMNS)
    tl.store(base + place, tl.reshape(x, [ROWS * COLUMNS]), mask=mask)


@triton.jit
def _places(row_stride, row_end, column_end, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block as one line of numbers, so that its layout says nothing about that of the tile."""
    i = tl.arange(0, ROWS * COLUMNS)
    row, column = i // COLUMNS, i % COLUMNS
    return row * row_stride + column, (row < row_end) & (column < column_end)


@triton.jit
def load_decay(log_decay, at, rows, end):
    """f and 1 - f of the tokens from `at` on; past the end 1 and 0, which moves no state."""
    x = tiles.load_numbers(locate.skip(log_decay, tl.cast(at, tl.int64)), rows, end).to(tl.float32)
    return tl.exp(x)[:, None, None], one_minus_exp(x)[:, None, None]


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) of x <= 0, by its series where that would cancel."""
    series = 1.0 + x * 0.2 * (1.0 + x * 0.16666667 * (1.0 + x * 0.14285714))
    series = 1.0 + x * 0.5 * (1.0 + x * 0.33333333 * (1.0 + x * 0.25 * series))
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp(x))


@triton.jit
def tanh(x):
    """To 2e-7 of itself; by its series where the difference of exponentials would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    series = x2 * (x2 * (x2 * (x2 * 0.021869489 - 0.053968254) + 0.13333333) - 0.33333333)
    return tl.where(x2 < 0.0625, x + x * series, tl.where(x < 0.0, -far, far))


@triton.jit
def compose(p, q, before_p, before_q, next_p, next_q, next_before_p, next_before_q):
    """Two maps one after the other: to the state after the last token, and to the one before it."""
    return next_p * p, next_p * q + next_q, next_before_p * p, next_before_p * q + next_before_q


@triton.jit
def affine_scan(slope, bias, entering, REVERSE: tl.constexpr):
    """s -> slope s + bias from token to token: what comes after each of them, and before it.

    entering: what the first token finds, in its place of the tile, and zero elsewhere.
    """
    maps = (slope, bias + slope * entering, tl.full(slope.shape, 1.0, tl.float32), entering)
    _, after, _, before = tl.associative_scan(maps, 0, compose, reverse=REVERSE)
    return after, before


@triton.jit
def clamp(x, bound):
    """x within +-bound; nan stays nan, so that a nan among the inputs is seen in the output."""
    low = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sweep(before, new, keep, write, weight, entering, bound):
    """Newton's next states after and before each token, from a guess and its tanh."""
    bent = write * (1.0 - new * new) * weight
    after, before = affine_scan(keep + bent, write * new - bent * before, entering, False)
    return after, clamp(before, bound)


@triton.jit
def solve(written, keep, write, weight, start, rows, sweeps, tolerance, CHUNK: tl.constexpr):
    """State before every token of the chunk, its tanh, the residual, and how many sweeps it took.

    written: k v^T; keep and write: f and 1 - f; start: the state before the chunk; rows: 0, 1, ...

    The guess is the solution for weight = 0. No state is larger than one or its start, and no
    iterate is left to be: where two resting points lie beside each other, steps go far. After as
    many sweeps as tokens every state is exact.
    """
    entering = tl.where(rows == 0, start, 0.0)
    bound = tl.maximum(tl.abs(start), 1.0)
    slope = tl.broadcast_to(keep, written.shape)
    after, before = affine_scan(slope, write * tanh(written), entering, False)
    new = tanh(weight * before + written)
    done = tl.minimum(sweeps, CHUNK)
    for _ in range(0, done):
        after, before = sweep(before, new, keep, write, weight, entering, bound)
        new = tanh(weight * before + written)
    residual = tl.max(tl.abs(after - keep * before - write * new))
    while (residual > tolerance) & (done < CHUNK):
        after, before = sweep(before, new, keep, write, weight, entering, bound)
        new = tanh(weight * before + written)
        residual = tl.max(tl.abs(after - keep * before - write * new))
        done += 1
    return before, new, residual, done
