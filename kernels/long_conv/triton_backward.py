"""Device functions of the convolution's gradients; columns and states are as in triton_forward.

The gradient of the columns is a convolution too, back in time: triton_forward.chunk_steps and
chunk_convolve with the matrices transposed.
"""

import triton
import triton.language as tl

from supra.kernels.long_conv.triton_forward import load_modes, store_modes
from supra.kernels.tiles import dot, load_tile, narrow, sequence, store_tile


@triton.jit
def chunk_d_states(
    steps, states, d_states, whole, early, d_end, d_initial, d_whole, d_early,
    cu_seqlens, chunk_offsets, sequences, length, chunks, slots, lanes,
    COLUMNS: tl.constexpr, MODES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_END: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what every chunk adds to the state, and of the powers that multiply it.

    steps: what the outputs of a slot add to the gradient of the state that it enters with. d_whole
    and d_early [N, lanes, MODES]. grid and all else: as for triton_forward.chunk_states.
    """
    n = tl.program_id(0)
    _, _, tokens, first = sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)
    at = tl.program_id(1) * BLOCK
    lane = tl.arange(0, BLOCK)
    mode = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    left, head, heads = lanes - at, (at + lane) // COLUMNS, lanes // COLUMNS
    stride = slots * MODES
    place = at * tl.cast(stride, tl.int64)
    steps += place
    states += place
    d_states += place
    here = (n * tl.cast(lanes, tl.int64) + at) * MODES
    zero = tl.zeros([BLOCK, BLOCK_M // 2], tl.float64)
    real = zero
    imaginary = zero
    if HAS_END:
        real, imaginary = load_modes(d_end + here, MODES, lane, left, mode, MODES)
    a, b = load_modes(whole, MODES, head, heads, mode, MODES)
    whole_real = zero
    whole_imaginary = zero
    count = tl.cdiv(tokens, CHUNK)
    for back in range(1, count):
        slot = (first + count - back) * MODES
        store_modes(
            d_states + slot, stride, lane, left, mode, MODES,
            narrow(real, PRECISION), narrow(imaginary, PRECISION),
        )  # fmt: skip
        s, t = load_modes(states + slot, stride, lane, left, mode, MODES)
        whole_real += s * real + t * imaginary
        whole_imaginary += s * imaginary - t * real
        x, y = load_modes(steps + slot, stride, lane, left, mode, MODES)
        x += a * real + b * imaginary
        imaginary = y + a * imaginary - b * real
        real = x
    store_modes(
        d_whole + here, MODES, lane, left, mode, MODES,
        whole_real.to(tl.float32), whole_imaginary.to(tl.float32),
    )  # fmt: skip
    if count > 0:
        store_modes(
            d_states + first * MODES, stride, lane, left, mode, MODES,
            narrow(real, PRECISION), narrow(imaginary, PRECISION),
        )  # fmt: skip
    if HAS_INITIAL:
        slot = (chunks + n) * MODES
        kept = narrow(zero, PRECISION)
        store_modes(d_states + slot, stride, lane, left, mode, MODES, kept, kept)
        early_real = zero
        early_imaginary = zero
        if count > 0:
            s, t = load_modes(states + slot, stride, lane, left, mode, MODES)
            early_real = s * real + t * imaginary
            early_imaginary = s * imaginary - t * real
            a, b = load_modes(early + n * heads * MODES, MODES, head, heads, mode, MODES)
            x, y = load_modes(steps + slot, stride, lane, left, mode, MODES)
            x += a * real + b * imaginary
            imaginary = y + a * imaginary - b * real
            real = x
        store_modes(
            d_initial + here, MODES, lane, left, mode, MODES,
            real.to(tl.float32), imaginary.to(tl.float32),
        )  # fmt: skip
        store_modes(
            d_early + here, MODES, lane, left, mode, MODES,
            early_real.to(tl.float32), early_imaginary.to(tl.float32),
        )  # fmt: skip


@triton.jit
def chunk_products(
    left, right, products, rows, heads, parts,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over rows of left [H, rows, LEFT] times right [H, rows, RIGHT]: a matrix's gradient.

    grid: (parts * blocks of LEFT * blocks of RIGHT, H). A part is some of the rows; products
    [parts, H, LEFT, RIGHT] are to be added up.
    """
    across: tl.constexpr = (RIGHT + BLOCK_M - 1) // BLOCK_M
    blocks: tl.constexpr = across * ((LEFT + BLOCK_M - 1) // BLOCK_M)
    part, block, head = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    line = tl.arange(0, BLOCK)
    column = (block // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    other = (block % across) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = head * tl.cast(rows, tl.int64)
    left += place * LEFT
    right += place * RIGHT
    acc = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    count = tl.cdiv(tl.cdiv(rows, BLOCK), parts)
    for i in range(0, count):
        at = (part * count + i) * BLOCK
        x = load_tile(left + tl.cast(at, tl.int64) * LEFT, LEFT, line, rows - at, column, LEFT)
        y = load_tile(right + tl.cast(at, tl.int64) * RIGHT, RIGHT, line, rows - at, other, RIGHT)
        acc = dot(tl.trans(x), y, acc, PRECISION)
    base = products + (part * tl.cast(heads, tl.int64) + head) * (LEFT * RIGHT)
    store_tile(base, RIGHT, column, LEFT, other, RIGHT, acc)
