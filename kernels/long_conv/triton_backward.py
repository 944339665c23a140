"""Device functions of the convolution's gradients; columns and states are as in triton_forward.

The gradient of the columns is a convolution too, back in time: triton_forward.chunk_steps and
chunk_convolve with the matrices transposed.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.long_conv.triton_forward import (
    block_of_lanes,
    load_modes,
    multiply,
    multiply_add,
    store_modes,
)


@triton.jit
def chunk_d_states(
    steps, states, d_states, whole, early, d_end, d_initial, d_whole, d_early, seqs, chunks, slots,
    lanes, COLUMNS: tl.constexpr, MODES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_END: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what every chunk adds to the state, and of the powers that multiply it.

    steps: what the outputs of a slot add to the gradient of the state that it enters with. d_whole
    and d_early [N, lanes, MODES]. grid and all else: as for triton_forward.chunk_states.
    """
    n = tl.program_id(0)
    _, _, tokens, first = locate.sequence(n, seqs, CHUNK)
    lane, left, head, heads, mode, place, here = block_of_lanes(
        n, slots, lanes, COLUMNS, MODES, BLOCK, BLOCK_M
    )
    stride = slots * MODES
    steps += place
    states += place
    d_states += place
    zero = tl.zeros([BLOCK, BLOCK_M // 2], tl.float64)
    d_z = (zero, zero)
    if HAS_END:
        d_z = load_modes(d_end + here, MODES, lane, left, mode, MODES)
    power = conjugate(load_modes(whole, MODES, head, heads, mode, MODES))
    d_power = (zero, zero)
    count = tl.cdiv(tokens, CHUNK)
    for back in range(1, count):
        slot = (first + count - back) * MODES
        store_modes(d_states + slot, stride, lane, left, mode, MODES, d_z, PRECISION)
        z = conjugate(load_modes(states + slot, stride, lane, left, mode, MODES))
        d_power = multiply_add(z, d_z, d_power)
        step = load_modes(steps + slot, stride, lane, left, mode, MODES)
        d_z = multiply_add(power, d_z, step)
    store_modes(d_whole + here, MODES, lane, left, mode, MODES, d_power, "float32")
    if count > 0:
        slot = first * MODES
        store_modes(d_states + slot, stride, lane, left, mode, MODES, d_z, PRECISION)
    if HAS_INITIAL:
        slot = (chunks + n) * MODES
        store_modes(d_states + slot, stride, lane, left, mode, MODES, (zero, zero), PRECISION)
        d_power = (zero, zero)
        if count > 0:
            z = conjugate(load_modes(states + slot, stride, lane, left, mode, MODES))
            d_power = multiply(z, d_z)
            power = load_modes(early + n * heads * MODES, MODES, head, heads, mode, MODES)
            step = load_modes(steps + slot, stride, lane, left, mode, MODES)
            d_z = multiply_add(conjugate(power), d_z, step)
        store_modes(d_initial + here, MODES, lane, left, mode, MODES, d_z, "float32")
        store_modes(d_early + here, MODES, lane, left, mode, MODES, d_power, "float32")


@triton.jit
def conjugate(z):
    return z[0], -z[1]


@triton.jit
def chunk_products(
    left, right, products, rows, heads, parts, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
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
        x = tiles.load(left + tl.cast(at, tl.int64) * LEFT, LEFT, line, rows - at, column, LEFT)
        y = tiles.load(right + tl.cast(at, tl.int64) * RIGHT, RIGHT, line, rows - at, other, RIGHT)
        acc = tiles.dot(tl.trans(x), y, acc, PRECISION)
    base = products + (part * tl.cast(heads, tl.int64) + head) * (LEFT * RIGHT)
    tiles.store(base, RIGHT, column, LEFT, other, RIGHT, acc)
