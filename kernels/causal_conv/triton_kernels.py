"""Triton kernels of the causal convolution.

Legend: a sequence has TAPS - 1 rows of state and then its tokens. `rows` count from the first row
of the state: token t is row t + TAPS - 1, and its window is rows t to t + TAPS - 1. A program has
TILE rows (or tokens) and BLOCK channels. It loads its rows once for every tap; all loads but
the first come from the cache.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.launch import Sequences


@triton.jit
def place(
    input, state, seqs,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a program works in a grid (chunks, blocks of channels).

    (first row, rows, tokens of the sequence, columns; the sequence in input and in state; its
    places in a contiguous tensor and in the states)
    """
    chunk, length = tl.program_id(0), seqs.length
    extended = Sequences(seqs.cu_seqlens, seqs.chunk_offsets, seqs.count, length + TAPS - 1)
    n = locate.sequence_of(chunk, extended, TILE)
    batch, begin, tokens, first = locate.sequence(n, extended, TILE)
    if seqs.cu_seqlens is None:
        tokens = length
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = batch.to(tl.int64)
    dense = (batch * length + begin) * WIDTH
    state_at = n.to(tl.int64) * (TAPS - 1) * WIDTH
    start = (chunk - first) * TILE
    rows = start + tl.arange(0, TILE)
    input = locate.at(input, batch, begin, 0)
    if state is not None:
        state += state_at
    return start, rows, tokens, columns, input, state, dense, state_at


@triton.jit
def load_rows(base, stride, rows, count, columns, WIDTH: tl.constexpr):
    """[rows, columns] as float32; zero where a row is not in 0 ... count - 1."""
    mask = ((rows >= 0) & (rows < count))[:, None] & (columns < WIDTH)[None, :]
    places = rows[:, None].to(tl.int64) * stride + columns[None, :]  # rows of a whole sequence
    return tl.load(base + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(base, rows, count, columns, WIDTH: tl.constexpr, x):
    mask = ((rows >= 0) & (rows < count))[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None].to(tl.int64) * WIDTH + columns[None, :], x, mask=mask)


@triton.jit
def load_window(input, state, rows, tokens, columns, TAPS: tl.constexpr, WIDTH: tl.constexpr):
    x = load_rows(input.data, input.time, rows - (TAPS - 1), tokens, columns, WIDTH)
    if state is not None:
        before = load_rows(state, WIDTH, rows, TAPS - 1, columns, WIDTH)
        x = tl.where((rows < TAPS - 1)[:, None], before, x)
    return x


@triton.jit
def load_column(weight, j, columns, WIDTH: tl.constexpr):
    """Factors of the j-th row of every window, [1, columns]."""
    x = tl.load(weight + j * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    return x.to(tl.float32)[None, :]


@triton.jit
def convolve(
    input, state, weight, bias, rows, tokens, columns, TAPS: tl.constexpr, WIDTH: tl.constexpr
):
    """Sums of the tokens whose windows begin at these rows, and the first rows of the windows."""
    first = load_window(input, state, rows, tokens, columns, TAPS, WIDTH)
    total = first * load_column(weight, 0, columns, WIDTH)
    if bias is not None:
        total += load_column(bias, 0, columns, WIDTH)
    for j in range(1, TAPS):
        x = load_window(input, state, rows + j, tokens, columns, TAPS, WIDTH)
        total += x * load_column(weight, j, columns, WIDTH)
    return total, first


@triton.jit
def forward(
    input, weight, bias, state, seqs, output, end, WIDTH: tl.constexpr, TAPS: tl.constexpr,
    SILU: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, rows, tokens, columns, input, state, dense, state_at = place(
        input, state, seqs, WIDTH, TAPS, TILE, BLOCK
    )
    total, first = convolve(input, state, weight, bias, rows, tokens, columns, TAPS, WIDTH)
    if SILU:
        total *= tl.sigmoid(total)
    store_rows(output + dense, rows, tokens, columns, WIDTH, total)
    if start + TILE > tokens:
        store_rows(end + state_at, rows - tokens, TAPS - 1, columns, WIDTH, first)


@triton.jit
def backward_sums(
    input, weight, bias, state, seqs, d_output, d_sum, partial,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the sums before silu; what this chunk adds to those of the columns and bias."""
    _, rows, tokens, columns, input, state, dense, _ = place(
        input, state, seqs, WIDTH, TAPS, TILE, BLOCK
    )
    d = load_rows(d_output + dense, WIDTH, rows, tokens, columns, WIDTH)
    if SILU:
        total, _ = convolve(input, state, weight, bias, rows, tokens, columns, TAPS, WIDTH)
        gate = tl.sigmoid(total)
        d *= gate * (1 + total * (1 - gate))
        store_rows(d_sum + dense, rows, tokens, columns, WIDTH, tiles.narrow(d, PRECISION))
    partial += tl.program_id(0).to(tl.int64) * (TAPS + 1) * WIDTH + columns
    for j in range(TAPS):
        x = load_window(input, state, rows + j, tokens, columns, TAPS, WIDTH)
        tl.store(partial + j * WIDTH, tl.sum(d * x, 0), mask=columns < WIDTH)
    tl.store(partial + TAPS * WIDTH, tl.sum(d, 0), mask=columns < WIDTH)


@triton.jit
def backward_window(
    input, weight, bias, state, seqs, d_sum, d_input, d_state, d_end, WIDTH: tl.constexpr,
    TAPS: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows: every sum that has the row in its window, and the final state."""
    _, rows, tokens, columns, _, _, dense, state_at = place(
        input, state, seqs, WIDTH, TAPS, TILE, BLOCK
    )
    d = load_rows(d_sum + dense, WIDTH, rows, tokens, columns, WIDTH)
    total = d * load_column(weight, 0, columns, WIDTH)
    for j in range(1, TAPS):
        d = load_rows(d_sum + dense, WIDTH, rows - j, tokens, columns, WIDTH)
        total += d * load_column(weight, j, columns, WIDTH)
    if d_end is not None:
        total += load_rows(d_end + state_at, WIDTH, rows - tokens, TAPS - 1, columns, WIDTH)
    store_rows(d_input + dense, rows - (TAPS - 1), tokens, columns, WIDTH, total)
    if d_state is not None:
        store_rows(d_state + state_at, rows, TAPS - 1, columns, WIDTH, total)


@triton.jit
def step(
    input, weight, bias, state, output,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of a sequence. A channel belongs to one thread, which reads before it writes."""
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    state += n * (TAPS - 1) * WIDTH + columns
    input = input.data + n * input.batch + columns
    x = tl.load(state if TAPS > 1 else input, mask=mask, other=0.0)
    total = x.to(tl.float32) * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    for j in range(1, TAPS):
        x = tl.load(state + j * WIDTH if j < TAPS - 1 else input, mask=mask, other=0.0)
        tl.store(state + (j - 1) * WIDTH, x, mask=mask)
        factor = tl.load(weight + j * WIDTH + columns, mask=mask, other=0.0)
        total += x.to(tl.float32) * factor.to(tl.float32)
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(output + n * WIDTH + columns, total, mask=mask)
