"""Tiles of matrices in Triton kernels: products, loads and stores.

Legend: a tile is TILE tokens of one head; a chunk is CHUNK tokens, a few tiles, after which the
state is kept.
"""

import triton
import triton.language as tl


@triton.jit
def narrow(x, PRECISION: tl.constexpr):
    """x as the operand of a product, or as a state that is kept: bf16 or float32."""
    if PRECISION == "bf16":
        return x.to(tl.bfloat16)
    elif PRECISION == "bf16_emulated":
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536  # round to nearest even
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; launch.precision() says what PRECISION does."""
    if PRECISION == "bf16" or PRECISION == "bf16_emulated":
        return tl.dot(narrow(a, PRECISION), narrow(b, PRECISION), acc)
    elif a.dtype == tl.float16 and b.dtype == tl.float16:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def load(base, row_stride, rows, row_end, columns, WIDTH: tl.constexpr):
    """[rows, columns] from a matrix of WIDTH columns; zero outside of it."""
    mask = (rows < row_end)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_rows(x, rows, row_end, columns, WIDTH: tl.constexpr):
    """The same from x, launch.Rows with its first row at rows = 0."""
    return load(x.data, x.time, rows, row_end, columns, WIDTH)


@triton.jit
def store(base, row_stride, rows, row_end, columns, WIDTH: tl.constexpr, x):
    mask = (rows < row_end)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * row_stride + columns[None, :], x, mask=mask)


@triton.jit
def load_state(base, columns_k, columns_v, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr):
    """A block of one state [KEY_WIDTH, VALUE_WIDTH]; zero outside of it."""
    return load(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH)


@triton.jit
def store_state(base, columns_k, columns_v, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, x):
    store(base, VALUE_WIDTH, columns_k, KEY_WIDTH, columns_v, VALUE_WIDTH, x)


@triton.jit
def load_vector(base, stride, places, end):
    """One number at each place; zero from `end` on."""
    return tl.load(base + places * stride, mask=places < end, other=0.0)


@triton.jit
def load_numbers(x, rows, row_end):
    """One number of each row of x, launch.Rows; zero from `row_end` on."""
    return load_vector(x.data, x.time, rows, row_end)


@triton.jit
def load_token(x, t, columns, WIDTH: tl.constexpr):
    """Token t of x, launch.Rows of some columns of a head, in float32; zero past the end."""
    place = x.data + t * tl.cast(x.time, tl.int64)
    return tl.load(place, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def store_vector(base, places, end, x):
    tl.store(base + places, x, mask=places < end)


@triton.jit
def products(
    left, left_end, right, right_end, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of rows of left and right, launch.Rows of WIDTH columns, [left rows, right rows]."""
    found = tl.zeros([rows.shape[0], rows.shape[0]], tl.float32)
    for at in range(0, WIDTH, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        x = load_rows(left, rows, left_end, columns, WIDTH)
        y = load_rows(right, rows, right_end, columns, WIDTH)
        found = dot(x, tl.trans(y), found, PRECISION)
    return found


@triton.jit
def state_products(
    x, end, state, rows, columns_k, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of rows of x [rows, VALUE_WIDTH] with rows of a state, [rows, columns_k]."""
    found = tl.zeros([rows.shape[0], columns_k.shape[0]], tl.float32)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns_v = v0 + tl.arange(0, BLOCK_V)
        tile = load_rows(x, rows, end, columns_v, VALUE_WIDTH)
        s = load_state(state, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
        found = dot(tile, tl.trans(s), found, PRECISION)
    return found


@triton.jit
def load_pairs(base, rows, row_end):
    """Two numbers of every row, which lie side by side; zero past the end.

    Loaded one by one they are fewer than a block has threads, so that the compiler thinks each load
    cheap and repeats it in every thread's layout: up to 68 scalar loads and 112 bytes of spills.
    """
    side = tl.arange(0, 2)
    mask = (rows < row_end)[:, None] & (side < 2)[None, :]
    return tl.split(tl.load(base + rows[:, None] * 2 + side[None, :], mask=mask, other=0.0))


@triton.jit
def store_pairs(base, rows, row_end, first, second):
    side = tl.arange(0, 2)
    mask = (rows < row_end)[:, None] & (side < 2)[None, :]
    tl.store(base + rows[:, None] * 2 + side[None, :], tl.join(first, second), mask=mask)
