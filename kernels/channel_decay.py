"""Decay per key channel between the tokens of a chunk, as Triton kernels read it.

A chunk is TILE tokens, a binary tree as in channel_tiles.py: at the level size, blocks of size
tokens pair up, and the later one of a pair reads the earlier one through the boundary between them.
So every exponent is the sum of the logs on one side of a boundary, and never positive.

Sums are integers in units of 2^-18, so that their differences are exact after any number of resets:
64 logs of -104, which is exp() = 0 in float32, stay below 2^31. The rounding of a sum changes a
weight by 2e-6 at most. It does not add up over chunks, whose whole decay is kept in float32.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.checks import LOWEST_LOG_DECAY

UNIT = tl.constexpr(2.0**-18)
LOWEST = tl.constexpr(LOWEST_LOG_DECAY)


@triton.jit
def decay_sums(
    log_decay, sums, whole, seqs, heads,
    KEY_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of log_decay since the chunk began, [B, T, Hkv, K], and whole decays [chunks, Hkv, K].

    grid: (chunks * blocks of K, Hkv).
    """
    chunk, _, head, _, row, token, left, rows, columns = locate.chunk(
        seqs, KEY_WIDTH, BLOCK_K, TILE
    )
    if left <= 0:
        return
    log_decay = locate.at(log_decay, row, token, head)
    x = tiles.load_rows(log_decay, rows, left, columns, KEY_WIDTH).to(tl.float32)
    exact = (tl.maximum(x, LOWEST) * 2.0**40).to(tl.int64)
    base = whole + locate.slot_offset(chunk, head, heads, KEY_WIDTH)
    tiles.store_vector(base, columns, KEY_WIDTH, tl.exp(tl.sum(exact, 0).to(tl.float32) * 2.0**-40))
    inexact = ((tl.cumsum(exact, 0) + (1 << 21)) >> 22).to(tl.int32)
    # as tiles.store() at the offset of the head, this takes up to 28 more registers
    base = (
        sums + locate.dense_offset(row, token, seqs.length, 0, heads, KEY_WIDTH) + head * KEY_WIDTH
    )
    mask = (rows < left)[:, None] & (columns < KEY_WIDTH)[None, :]
    tl.store(base + rows[:, None] * heads * KEY_WIDTH + columns[None, :], inexact, mask=mask)


@triton.jit
def load_sums(sums, rows, left, columns, WIDTH: tl.constexpr):
    """Sums up to and with each row; none before the first, constant after the last."""
    mask = (rows >= 0)[:, None] & (columns < WIDTH)[None, :]
    place = tl.minimum(rows, left - 1)[:, None] * sums.time + columns[None, :]
    return tl.load(sums.data + place, mask=mask, other=0)


@triton.jit
def entering_decay(sums, rows, left, columns, WIDTH: tl.constexpr, HAS_BONUS: tl.constexpr):
    """Decay from the begin of the chunk to where each row reads the state."""
    read = load_sums(sums, rows - HAS_BONUS, left, columns, WIDTH)
    return tl.exp(read.to(tl.float32) * UNIT)


@triton.jit
def leaving_decay(sums, rows, left, columns, WIDTH: tl.constexpr):
    """Decay from each row to the end of the chunk, whose sum is the least of all."""
    own = load_sums(sums, rows, left, columns, WIDTH)
    return tl.exp((tl.min(own, 0)[None, :] - own).to(tl.float32) * UNIT)


@triton.jit
def boundary_decay(sums, rows, left, columns, size, WIDTH: tl.constexpr, HAS_BONUS: tl.constexpr):
    """Decay between each row and the boundary inside its pair of blocks.

    For a row of the later block it is what its query meets, for one of the earlier its key.
    """
    later = (rows & size) != 0
    own = load_sums(sums, tl.where(later, rows - HAS_BONUS, rows), left, columns, WIDTH)
    boundary = (rows & (-2 * size)) + (size - 1)
    middle = load_sums(sums, boundary, left, columns, WIDTH)
    logs = tl.where(later[:, None], own - middle, middle - own)
    return tl.exp(logs.to(tl.float32) * UNIT)


@triton.jit
def crosses(later, earlier, size):
    """Whether two rows meet at this level: the one in the later, the other in the earlier block."""
    same = (later & (-2 * size)) == (earlier & (-2 * size))
    return same & ((later & size) != 0) & ((earlier & size) == 0)


@triton.jit
def from_here_on(rows, size, STRICT: tl.constexpr):
    """[i, j] 1.0 where row j of the same block of size rows follows row i, or is it."""
    same = (rows & -size)[:, None] == (rows & -size)[None, :]
    return (same & (rows[None, :] - rows[:, None] >= STRICT)).to(tl.float32)


@triton.jit
def before_here(rows, size):
    """[i, j] 1.0 where row j of the same block of size rows comes before row i."""
    same = (rows & -size)[:, None] == (rows & -size)[None, :]
    return (same & (rows[None, :] < rows[:, None])).to(tl.float32)
