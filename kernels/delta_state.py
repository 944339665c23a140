"""A block of a state [KEY_WIDTH, columns_v] in registers, in one or two halves of BLOCK_K rows.

Every error needs all channels of the keys, so a program has them all: BLOCK_K, and as many again
where keys are wider. As one block they would spill 100 bytes on sm_100. The second half is unused
where one will do. columns_k: 0 ... BLOCK_K - 1.
"""

import triton
import triton.language as tl

from supra.kernels import tiles


@triton.jit
def zeros(BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    zero = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    return zero, zero


@triton.jit
def load(base, columns_k, columns_v, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr):
    first = tiles.load_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
    second = first
    if columns_k.shape[0] < KEY_WIDTH:
        columns_k += columns_k.shape[0]
        second = tiles.load_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
    return first, second


@triton.jit
def store(
    base, columns_k, columns_v, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, state,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the state as narrow as tiles.narrow() makes it."""
    for half in tl.static_range(tl.cdiv(KEY_WIDTH, columns_k.shape[0])):
        kept, columns = tiles.narrow(state[half], PRECISION), columns_k + half * columns_k.shape[0]
        tiles.store_state(base, columns, columns_v, KEY_WIDTH, VALUE_WIDTH, kept)


@triton.jit
def scale(state, factor, columns_k, KEY_WIDTH: tl.constexpr):
    second = state[1] * factor if columns_k.shape[0] < KEY_WIDTH else state[1]
    return state[0] * factor, second


@triton.jit
def scale_channels(state, factors, columns_k, KEY_WIDTH: tl.constexpr):
    """factors: [KEY_WIDTH], one for each row of the state."""
    first, second = tiles.load_vector(factors, 1, columns_k, KEY_WIDTH), state[1]
    if columns_k.shape[0] < KEY_WIDTH:
        columns = columns_k + columns_k.shape[0]
        second *= tiles.load_vector(factors, 1, columns, KEY_WIDTH)[:, None]
    return state[0] * first[:, None], second


@triton.jit
def store_and_read(
    base, columns_k, columns_v, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, state, x, end,
    rows, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the state; products of the rows of x [rows, KEY_WIDTH] with it, [rows, columns_v].

    Half by half: stored as a whole before it is read, it takes 32 KiB of shared memory, not 24.
    """
    found = tl.zeros([rows.shape[0], columns_v.shape[0]], tl.float32)
    for half in tl.static_range(tl.cdiv(KEY_WIDTH, columns_k.shape[0])):
        kept, columns = tiles.narrow(state[half], PRECISION), columns_k + half * columns_k.shape[0]
        tiles.store_state(base, columns, columns_v, KEY_WIDTH, VALUE_WIDTH, kept)
        tile = tiles.load_rows(x, rows, end, columns, KEY_WIDTH)
        found = tiles.dot(tile, kept, found, PRECISION)
    return found


@triton.jit
def write(state, x, end, rows, columns_k, y, KEY_WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """The state with the products of x [rows, KEY_WIDTH] and y [rows, columns_v] added."""
    tile = tiles.load_rows(x, rows, end, columns_k, KEY_WIDTH)
    first, second = tiles.dot(tl.trans(tile), y, state[0], PRECISION), state[1]
    if columns_k.shape[0] < KEY_WIDTH:
        tile = tiles.load_rows(x, rows, end, columns_k + columns_k.shape[0], KEY_WIDTH)
        second = tiles.dot(tl.trans(tile), y, second, PRECISION)
    return first, second
