"""Where a program of a Triton kernel works: its sequence, chunk, head and block, and their places.

Legend: tensors are [B, T, H, D], and packed rows have all sequences in one row of the batch. A
chunk is CHUNK tokens of one sequence; chunks are counted over all sequences. Token indices and
places are int64 scalars, offsets inside a tile int32.
"""

import triton
import triton.language as tl

from supra.kernels.launch import Rows


@triton.jit
def block_of_state(
    heads, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Where a program works in a grid (sequences * heads * blocks,).

    (lane, sequence, head, block of K, block of V, columns of K, columns of V). A lane is one head
    of one sequence; states before and after a sequence are [lanes, K, V].
    """
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = across * ((KEY_WIDTH + BLOCK_K - 1) // BLOCK_K)
    lane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    block_k = block // across if blocks > across else block * 0
    block_v = block % across
    columns_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    columns_v = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    sequence, head = lane // heads, lane % heads
    return tl.cast(lane, tl.int64), sequence, head, block_k, block_v, columns_k, columns_v


@triton.jit
def chunk(seqs, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Where a program works in a grid (chunks * blocks of WIDTH columns, heads).

    (chunk, block, head, sequence, row of the batch, first token of the chunk, tokens from there on,
    rows, columns of the block). No tokens are left for a chunk past the end of all sequences.
    """
    c, _, _, block, head, n, row, token, left, rows, columns = tile(
        seqs, WIDTH, BLOCK, CHUNK, CHUNK
    )
    return c, block, head, n, row, token, left, rows, columns


@triton.jit
def tile(seqs, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """The same in a grid (chunks * tiles of a chunk * blocks, heads).

    The tile comes second and its first row third. Token and tokens left are those of the chunk.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    tiles: tl.constexpr = CHUNK // TILE
    place, block, head = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    c, part = place // tiles, place % tiles
    n = sequence_of(c, seqs, CHUNK)
    row, begin, tokens, first = sequence(n, seqs, CHUNK)
    token, left, at = begin + (c - first) * CHUNK, tokens - (c - first) * CHUNK, part * TILE
    rows, columns = tl.arange(0, TILE), block * BLOCK + tl.arange(0, BLOCK)
    return c, part, at, block, head, n, row, token, left, rows, columns


@triton.jit
def sequence(n, seqs, CHUNK: tl.constexpr):
    """(row of the batch, first token in that row, tokens, first chunk) of sequence n."""
    if seqs.cu_seqlens is None:
        return n, tl.cast(0, tl.int64), seqs.length, n * tl.cdiv(seqs.length, CHUNK)
    else:
        begin = tl.load(seqs.cu_seqlens + n).to(tl.int64)
        tokens = (tl.load(seqs.cu_seqlens + n + 1) - begin).to(tl.int32)
        return n * 0, begin, tokens, tl.load(seqs.chunk_offsets + n).to(tl.int32)


@triton.jit
def sequence_of(chunk, seqs, CHUNK: tl.constexpr):
    """The sequence that a chunk lies in; the last one for a chunk past the end of them all."""
    if seqs.cu_seqlens is None:
        return chunk // tl.cdiv(seqs.length, CHUNK)
    else:
        low = chunk * 0
        high = low + seqs.count
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(seqs.chunk_offsets + middle) <= chunk
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        return low


@triton.jit
def at(x, row, token, head, columns=0):
    """x (launch.Rows) from a token of a head on, or those columns of it."""
    place = row * tl.cast(x.batch, tl.int64) + token * tl.cast(x.time, tl.int64)
    place += head * tl.cast(x.head, tl.int64)
    return Rows(x.data + place + columns, x.batch, x.time, x.head)


@triton.jit
def skip(x, tokens):
    """x (launch.Rows) from some tokens later on: int64, but within a chunk int32, which saves up to
    36 registers."""
    return Rows(x.data + tokens * x.time, x.batch, x.time, x.head)


@triton.jit
def skip_heads(x, heads):
    return Rows(x.data + heads * tl.cast(x.head, tl.int64), x.batch, x.time, x.head)


@triton.jit
def dense(base, row, token, head, heads, seqs, WIDTH: tl.constexpr):
    """A contiguous tensor [B, T, heads, WIDTH] as launch.Rows, from a token of a head on."""
    at = base + dense_offset(row, token, seqs.length, head, heads, WIDTH)
    return Rows(at, 0, heads * WIDTH, WIDTH)


@triton.jit
def lane_offset(lane, total, row, token, length):
    """Place of a token in a contiguous tensor [lanes, total], total = B * length; int64."""
    return row * tl.cast(length, tl.int64) + token + lane * tl.cast(total, tl.int64)


@triton.jit
def dense_offset(row, token, length, head, heads, WIDTH: tl.constexpr):
    """Place of a token of a head in a contiguous tensor [B, length, heads, WIDTH], int64."""
    return ((row * tl.cast(length, tl.int64) + token) * heads + head) * WIDTH


@triton.jit
def slot_offset(slot, head, heads, SIZE: tl.constexpr):
    """Place of a head's state in a contiguous tensor [slots, heads, SIZE], int64."""
    return (tl.cast(slot, tl.int64) * heads + head) * SIZE
