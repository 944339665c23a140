"""What Triton kernels share: products of tiles, tiles in memory, decay, sequences in packed rows.

Legend: a tile is TILE tokens of one head; a chunk is CHUNK tokens, a few tiles, after which the
state is kept. Token indices are int64 scalars, offsets inside a tile int32.
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
def offset(row, batch_stride, token, time_stride, head, head_stride):
    """Place of a token of a head in a tensor [B, T, H, D], int64."""
    place = row * tl.cast(batch_stride, tl.int64) + token * tl.cast(time_stride, tl.int64)
    return place + head * tl.cast(head_stride, tl.int64)


@triton.jit
def load_tile(base, row_stride, rows, row_end, columns, WIDTH: tl.constexpr):
    """[rows, columns] from a matrix of WIDTH columns; zero outside of it."""
    mask = (rows < row_end)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, row_stride, rows, row_end, columns, WIDTH: tl.constexpr, x):
    mask = (rows < row_end)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * row_stride + columns[None, :], x, mask=mask)


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


@triton.jit
def sequence(n, cu_seqlens, chunk_offsets, length, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """(row of the batch, first token in that row, tokens, first chunk) of sequence n."""
    if PACKED:
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        tokens = (tl.load(cu_seqlens + n + 1) - begin).to(tl.int32)
        return n * 0, begin, tokens, tl.load(chunk_offsets + n).to(tl.int32)
    else:
        return n, tl.cast(0, tl.int64), length, n * tl.cdiv(length, CHUNK)


@triton.jit
def sequence_of(chunk, chunk_offsets, sequences, length, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """The sequence that a chunk lies in; the last one for a chunk past the end of them all."""
    if PACKED:
        low = chunk * 0
        high = low + sequences
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(chunk_offsets + middle) <= chunk
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        return low
    else:
        return chunk // tl.cdiv(length, CHUNK)
