"""Triton kernels of linear attention's gradients: those of the states, and the factors of outputs.

Legend as in triton_forward. With a normalizer the gradient of the undivided output is
d_output * inverse, and every product of d_output with a value has `delta` = -sum(d_output * output)
added, as if the values had a column of ones; both come from output_factors. Without one, inverse is
the scale.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.decay import last_pair
from supra.kernels.linear_attention.triton_forward import store_both


@triton.jit
def output_factors(
    output, d_output, weights, factors, seqs, heads, total, eps,
    VALUE_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """1 / (weights + eps) and -sum(d_output * output) of every row, [Hq, B * T, 2].

    grid: (B * T / TILE, Hq).
    """
    token = tl.program_id(0) * tl.cast(TILE, tl.int64) + tl.arange(0, TILE)
    head = tl.program_id(1)
    valid = token < total
    delta = tl.zeros([TILE], tl.float32)
    place = token * heads + head
    d_place = token // seqs.length * d_output.batch + token % seqs.length * d_output.time
    d_place += head * tl.cast(d_output.head, tl.int64)
    for v0 in range(0, VALUE_WIDTH, BLOCK_V):
        columns = v0 + tl.arange(0, BLOCK_V)
        mask = valid[:, None] & (columns < VALUE_WIDTH)[None, :]
        o = tl.load(output + (place * VALUE_WIDTH)[:, None] + columns[None, :], mask=mask, other=0)
        do = tl.load(d_output.data + d_place[:, None] + columns[None, :], mask=mask, other=0)
        delta -= tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    inverse = 1 / (tl.load(weights + place, mask=valid, other=1.0) + eps)
    base = factors + head * tl.cast(total, tl.int64) * 2
    tiles.store_pairs(base, token, total, inverse, delta)


@triton.jit
def chunk_d_states(
    query, d_output, sums, factors, states, normalizers, d_end_memory, d_end_normalizer, d_states,
    d_normalizers, carried, d_memory, d_normalizer, seqs, heads, total, chunks, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the state after every chunk, from the last chunk to the first; heads = Hs.

    grid: (N * Hs * blocks,). `carried` [blocks, Hs, chunks] gets <state, its gradient>, which is
    the gradient of the log of the chunk's whole decay.
    """
    lane, n, head, block_k, block_v, columns_k, columns_v = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    rows = tl.arange(0, TILE)
    row, begin, tokens, first = locate.sequence(n, seqs, CHUNK)
    query = locate.at(query, row, begin, head * QUERIES)
    d_output = locate.at(d_output, row, begin, head * QUERIES)
    d_states += locate.slot_offset(first, head, heads, KEY_WIDTH * VALUE_WIDTH)
    states += locate.slot_offset(first + n, head, heads, KEY_WIDTH * VALUE_WIDTH)
    if factors is not None:
        factors += locate.lane_offset(head * QUERIES, total, row, begin, seqs.length) * 2
        d_normalizers += locate.slot_offset(first, head, heads, KEY_WIDTH)
        normalizers += locate.slot_offset(first + n, head, heads, KEY_WIDTH)
    if sums is not None:
        sums = locate.at(sums, row, begin, head)
        block = block_k * ((VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V) + block_v
        carried += (block * heads + head) * tl.cast(chunks, tl.int64) + first
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    d_z = tl.zeros([BLOCK_K], tl.float32)
    if d_end_memory is not None:
        base = d_end_memory + lane * (KEY_WIDTH * VALUE_WIDTH)
        acc = tiles.load_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
    if d_end_normalizer is not None:
        d_z = tiles.load_vector(d_end_normalizer + lane * KEY_WIDTH, 1, columns_k, KEY_WIDTH)

    count = tl.cdiv(tokens, CHUNK)
    for back in range(0, count):
        c = count - 1 - back
        store_both(
            d_states, d_normalizers, c, heads, tiles.narrow(acc, PRECISION), d_z,
            columns_k, columns_v, block_v, KEY_WIDTH, VALUE_WIDTH,
        )  # fmt: skip
        if sums is not None:
            along = _along(
                states, normalizers, c + 1, heads, acc, d_z, columns_k, columns_v, block_v,
                KEY_WIDTH, VALUE_WIDTH,
            )  # fmt: skip
            tl.store(carried + c, along)
            sums_c = locate.skip(sums, tl.cast(c * CHUNK, tl.int64))
            whole = tl.exp(last_pair(sums_c, tokens - c * CHUNK, CHUNK)[0])
            acc *= whole
            if factors is not None:
                d_z *= whole
        for t in range(0, CHUNK, TILE):
            at, entering, factors_at = c * CHUNK + t, None, factors
            if sums is not None:
                # half of a pair suffices; load_vector() from sums_c + t * 2 takes 60 more registers
                high = tl.load(sums_c.data + (t + rows) * 2, mask=rows < tokens - at, other=0.0)
                entering = tl.exp(high)
            if factors is not None:
                factors_at += at * 2
            q_at = locate.skip(query, tl.cast(at, tl.int64))
            d_at = locate.skip(d_output, tl.cast(at, tl.int64))
            acc, d_z = _add_queries(
                acc, d_z, q_at, d_at, entering, factors_at,
                total, scale, rows, tokens - at, columns_k, columns_v,
                KEY_WIDTH, VALUE_WIDTH, QUERIES, PRECISION,
            )  # fmt: skip

    if d_memory is not None:
        store_both(
            d_memory, d_normalizer, lane, 1, acc, d_z, columns_k, columns_v, block_v,
            KEY_WIDTH, VALUE_WIDTH,
        )  # fmt: skip


@triton.jit
def _along(
    states, normalizers, slot, heads, d_state, d_normalizer, columns_k, columns_v, block_v,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """<state, its gradient> of a block, with the normalizer's in the first block of V."""
    step = tl.cast(heads, tl.int64)
    base = states + slot * (step * (KEY_WIDTH * VALUE_WIDTH))
    s = tiles.load_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
    along = tl.sum(s.to(tl.float32) * d_state)
    if normalizers is not None and block_v == 0:
        z = tiles.load_vector(normalizers + slot * (step * KEY_WIDTH), 1, columns_k, KEY_WIDTH)
        along += tl.sum(z * d_normalizer)
    return along


@triton.jit
def _add_queries(
    acc, d_z, query, d_output, entering, factors, total, scale, rows, left, columns_k, columns_v,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a state and its normalizer, with those added from a tile that reads them."""
    for r in range(0, QUERIES):
        q_at = locate.skip_heads(query, r)
        q = tiles.load_rows(q_at, rows, left, columns_k, KEY_WIDTH)
        d_at = locate.skip_heads(d_output, r)
        do = tiles.load_rows(d_at, rows, left, columns_v, VALUE_WIDTH)
        if entering is not None:
            q = q * entering[:, None]
        if factors is not None:
            base = factors + r * tl.cast(total, tl.int64) * 2
            inverse, delta = tiles.load_pairs(base, rows, left)
            q = q * inverse[:, None]
            d_z += tl.sum(q.to(tl.float32) * delta[:, None], 0)
        else:
            q = q.to(tl.float32) * scale
        acc = tiles.dot(tl.trans(q), do, acc, PRECISION)
    return acc, d_z
