"""Device functions of the convolution: products with the model's matrices, states, decoding steps.

Rows are the chunks of all columns of a head, [H, rows, CHUNK]; states and steps are [H, rows,
MODES] with the real and the imaginary part of a mode side by side, MODES twice the modes.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles


@triton.jit
def chunk_steps(
    columns, matrix, steps, rows, MODES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What every chunk adds to the state after it: columns @ matrix [H, CHUNK, MODES].

    grid: (blocks of rows, H, blocks of modes). On the way back it is what the outputs of a chunk
    add to the gradient of the state before it.
    """
    head = tl.program_id(1)
    at = tl.program_id(0) * BLOCK
    line, time = tl.arange(0, BLOCK), tl.arange(0, CHUNK)
    mode = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = head * tl.cast(rows, tl.int64) + at
    u = tiles.load(columns + place * CHUNK, CHUNK, line, rows - at, time, CHUNK)
    w = tiles.load(matrix + head * (CHUNK * MODES), MODES, time, CHUNK, mode, MODES)
    found = tiles.dot(u, w, tl.zeros([BLOCK, BLOCK_M], tl.float32), PRECISION)
    tiles.store(steps + place * MODES, MODES, line, rows - at, mode, MODES, found)


@triton.jit
def chunk_convolve(
    columns, states, near, far, output, rows, MODES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """columns @ near [H, CHUNK, CHUNK] + states @ far [H, MODES, CHUNK]. grid: (row blocks, H)."""
    head = tl.program_id(1)
    at = tl.program_id(0) * BLOCK
    line, time = tl.arange(0, BLOCK), tl.arange(0, CHUNK)
    place = head * tl.cast(rows, tl.int64) + at
    u = tiles.load(columns + place * CHUNK, CHUNK, line, rows - at, time, CHUNK)
    t = tiles.load(near + head * (CHUNK * CHUNK), CHUNK, time, CHUNK, time, CHUNK)
    acc = tiles.dot(u, t, tl.zeros([BLOCK, CHUNK], tl.float32), PRECISION)
    for m0 in range(0, MODES, BLOCK_M):
        mode = m0 + tl.arange(0, BLOCK_M)
        x = tiles.load(states + place * MODES, MODES, line, rows - at, mode, MODES)
        r = tiles.load(far + head * (MODES * CHUNK), CHUNK, mode, MODES, time, CHUNK)
        acc = tiles.dot(x, r, acc, PRECISION)
    output += place * CHUNK
    tiles.store(output, CHUNK, line, rows - at, time, CHUNK, tiles.narrow(acc, PRECISION))


@triton.jit
def load_modes(base, stride, lines, end, modes, MODES: tl.constexpr):
    """Two tiles [lines, modes / 2] in float64, of real and of imaginary parts, which alternate."""
    both = tiles.load(base, stride, lines, end, modes, MODES).to(tl.float64)
    return tl.split(both.reshape(lines.shape[0], modes.shape[0] // 2, 2))


@triton.jit
def store_modes(base, stride, lines, end, modes, MODES: tl.constexpr, z, PRECISION: tl.constexpr):
    """Store z, the real and the imaginary parts, as narrow as tiles.narrow() makes them."""
    both = tl.join(tiles.narrow(z[0], PRECISION), tiles.narrow(z[1], PRECISION))
    both = both.reshape(lines.shape[0], modes.shape[0])
    tiles.store(base, stride, lines, end, modes, MODES, both)


@triton.jit
def multiply(x, y):
    """Products of complex numbers, each a real and an imaginary part."""
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


@triton.jit
def multiply_add(x, y, z):
    """x y + z"""
    found = multiply(x, y)
    return z[0] + found[0], z[1] + found[1]


@triton.jit
def block_of_lanes(
    n, slots, lanes,
    COLUMNS: tl.constexpr, MODES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Where a program works in a grid (sequences, blocks of lanes, blocks of modes).

    (lanes of the block, lanes from its first on, heads of these lanes, heads, modes, place of the
    block in [lanes, slots, MODES], place in [sequences, lanes, MODES])
    """
    at = tl.program_id(1) * BLOCK
    lane = tl.arange(0, BLOCK)
    mode = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = at * tl.cast(slots * MODES, tl.int64)
    here = (n * tl.cast(lanes, tl.int64) + at) * MODES
    return lane, lanes - at, (at + lane) // COLUMNS, lanes // COLUMNS, mode, place, here


@triton.jit
def chunk_states(
    steps, states, whole, early, initial, end, seqs, chunks, slots, lanes,
    COLUMNS: tl.constexpr, MODES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States that the slots enter with, and the one after the last chunk.

    A lane is a column of a head. grid: (sequences, blocks of lanes, blocks of modes). whole
    [H, MODES]: powers of the modes for a chunk; early [N, H, MODES]: for the first one, which the
    initial state is taken through; both float64. initial and end [N, lanes, MODES].
    """
    n = tl.program_id(0)
    _, _, tokens, first = locate.sequence(n, seqs, CHUNK)
    lane, left, head, heads, mode, place, here = block_of_lanes(
        n, slots, lanes, COLUMNS, MODES, BLOCK, BLOCK_M
    )
    stride = slots * MODES
    steps += place + first * MODES
    states += place
    zero = tl.zeros([BLOCK, BLOCK_M // 2], tl.float64)
    z = (zero, zero)
    count = tl.cdiv(tokens, CHUNK)
    if HAS_INITIAL:
        z = load_modes(initial + here, MODES, lane, left, mode, MODES)
        slot = states + (chunks + n) * MODES
        store_modes(slot, stride, lane, left, mode, MODES, z, PRECISION)
    states += first * MODES
    if count > 0:
        store_modes(states, stride, lane, left, mode, MODES, (zero, zero), PRECISION)
        step = load_modes(steps, stride, lane, left, mode, MODES)
        if HAS_INITIAL:
            power = load_modes(early + n * heads * MODES, MODES, head, heads, mode, MODES)
            step = multiply_add(power, z, step)
        z = step
    power = load_modes(whole, MODES, head, heads, mode, MODES)
    for c in range(1, count):
        store_modes(states + c * MODES, stride, lane, left, mode, MODES, z, PRECISION)
        step = load_modes(steps + c * MODES, stride, lane, left, mode, MODES)
        z = multiply_add(power, z, step)
    store_modes(end + here, MODES, lane, left, mode, MODES, z, "float32")


@triton.jit
def recurrent_steps(
    query, key, value, power, weight, skip, state, output, length, heads,
    MODES: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The recurrence token by token; the state [N, H, MODES, 2, K, V] is updated in place.

    grid: (B * H). power [H, MODES, 2] is float64: in float32 its rounding would add up.
    """
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    mode, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    known, valid = mode < MODES, column < VALUE_WIDTH
    mask = known[:, None] & valid[None, :]
    at = (head * MODES + mode) * 2
    a = tl.load(power + at, mask=known, other=0.0)[:, None]
    b = tl.load(power + at + 1, mask=known, other=0.0)[:, None]
    c = tl.load(weight + at, mask=known, other=0.0)[:, None]
    d = tl.load(weight + at + 1, mask=known, other=0.0)[:, None]
    size: tl.constexpr = KEY_WIDTH * VALUE_WIDTH
    state += tl.program_id(0).to(tl.int64) * (MODES * 2 * size)
    output += (row.to(tl.int64) * length * heads + head) * VALUE_WIDTH
    value = locate.at(value, row, 0, head)
    if key is not None:
        key = locate.at(key, row, 0, head)
    if query is not None:
        query = locate.at(query, row, 0, head)
    for t in range(0, length):
        v = tl.load(value.data + t * value.time + column, mask=valid, other=0.0).to(tl.float32)
        out = tl.zeros([BLOCK_V], tl.float32)
        for i in range(0, KEY_WIDTH):
            new = v
            if key is not None:
                new = v * tl.load(key.data + t * key.time + i).to(tl.float32)
            place = state + mode[:, None] * (2 * size) + i * VALUE_WIDTH + column[None, :]
            real = tl.load(place, mask=mask, other=0.0)
            imaginary = tl.load(place + size, mask=mask, other=0.0)
            x = (a * real - b * imaginary + new[None, :]).to(tl.float32)
            y = (a * imaginary + b * real).to(tl.float32)
            tl.store(place, x, mask=mask)
            tl.store(place + size, y, mask=mask)
            seen = 2 * tl.sum(c * x - d * y, 0)
            if skip is not None:
                seen += tl.load(skip + head) * new
            if query is not None:
                seen *= tl.load(query.data + t * query.time + i).to(tl.float32)
            out += seen
        tl.store(output + t * heads * VALUE_WIDTH + column, out, mask=valid)
