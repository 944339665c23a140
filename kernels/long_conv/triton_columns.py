"""Device functions around the convolution: from tensors [B, T, H, D] to columns, and back.

Columns are [H, K, V, slots, CHUNK]: the products k_i v_j of every head over time, in chunks that
lie in a row. Chunks end where their sequence ends, so that what a chunk adds to a state is the same
for all, and the first one has zeros in front. Only the state before a sequence is read from another
place then: for it there is a slot a sequence after those of the chunks, whose tokens are those of
the first chunk, at its beginning.

A tile is HEADS heads with BLOCK_K of their K and BLOCK_V of their V columns.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles


@triton.jit
def slot_of(slot, chunks, seqs, CHUNK: tl.constexpr):
    """(row of the sequence, its first token, place of the slot's first token in it, end of places).

    Places below zero and from the end on are empty.
    """
    n = locate.sequence_of(slot, seqs, CHUNK)
    n = tl.where(slot < chunks, n, slot - chunks)
    row, begin, tokens, first = locate.sequence(n, seqs, CHUNK)
    count = tl.cdiv(tokens, CHUNK)
    at = tokens - (count - slot + first) * CHUNK
    early = tokens - (count - 1) * CHUNK  # where the first chunk ends
    end = tl.where(slot < chunks, tokens, tl.minimum(early, tokens))
    return row, begin, tl.where(slot < chunks, at, 0), end


@triton.jit
def channels(head, at, lane, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Channels [H * WIDTH] of BLOCK columns of some heads, and which of them there are."""
    if BLOCK == WIDTH:  # then the compiler sees that they lie in a row
        return head * WIDTH + lane, lane >= 0
    else:
        column = at + lane % BLOCK
        return (head + lane // BLOCK) * WIDTH + column, column < WIDTH


@triton.jit
def lines(
    head, at_k, at_v, slots, heads, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of a tile's columns: their first slot, int64, and which of them there are."""
    lane = tl.arange(0, HEADS * BLOCK_K * BLOCK_V)
    h = head + lane // (BLOCK_K * BLOCK_V)
    i, j = at_k + lane // BLOCK_V % BLOCK_K, at_v + lane % BLOCK_V
    place = ((h * KEY_WIDTH + i) * VALUE_WIDTH + j).to(tl.int64) * slots
    return place, (h < heads) & (i < KEY_WIDTH) & (j < VALUE_WIDTH)


@triton.jit
def gather_columns(
    left, right, columns, seqs, chunks, slots, heads,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, HAS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of left [B, T, H * K] times right [B, T, H * V].

    grid: (slots, blocks of heads, blocks of K * blocks of V). Without HAS_FIRST the slots of first
    tokens are zeros.
    """
    across: tl.constexpr = (VALUE_WIDTH + BLOCK_V - 1) // BLOCK_V
    slot, head = tl.program_id(0), tl.program_id(1) * HEADS
    at_k, at_v = tl.program_id(2) // across * BLOCK_K, tl.program_id(2) % across * BLOCK_V
    row, begin, at, end = slot_of(slot, chunks, seqs, CHUNK)
    time = tl.arange(0, CHUNK)
    present = (at + time < end) & (at + time >= 0)
    if not HAS_FIRST:
        present = present & (slot < chunks)
    token = begin + at
    right = locate.at(right, row, token, 0)
    column, inside = channels(head, at_v, tl.arange(0, HEADS * BLOCK_V), BLOCK_V, VALUE_WIDTH)
    inside = inside & (column < heads * VALUE_WIDTH)
    mask = present[:, None] & inside[None, :]
    x = tl.load(right.data + time[:, None] * right.time + column[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32).reshape(CHUNK, HEADS, 1, BLOCK_V)
    if left is not None:
        left = locate.at(left, row, token, 0)
        column, inside = channels(head, at_k, tl.arange(0, HEADS * BLOCK_K), BLOCK_K, KEY_WIDTH)
        inside = inside & (column < heads * KEY_WIDTH)
        mask = present[:, None] & inside[None, :]
        y = tl.load(left.data + time[:, None] * left.time + column[None, :], mask=mask, other=0.0)
        x = x * y.to(tl.float32).reshape(CHUNK, HEADS, BLOCK_K, 1)
    x = tiles.narrow(x.reshape(CHUNK, HEADS * BLOCK_K * BLOCK_V), PRECISION)
    line, there = lines(
        head, at_k, at_v, slots, heads, KEY_WIDTH, VALUE_WIDTH, HEADS, BLOCK_K, BLOCK_V
    )
    place = (line + slot)[:, None] * CHUNK + time[None, :]
    tl.store(columns + place, tl.trans(x), mask=there[:, None] & (time >= 0)[None, :])


@triton.jit
def contract_columns(
    columns, by, output, seqs, chunks, slots, heads,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, OVER_KEY: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Columns times `by`, summed over their K (by [B, T, H * K]) or their V (by [B, T, H * V]).

    grid: (chunks, blocks of heads, blocks of the other of the two), and what is stored is [B, T, H
    * the other]. With FIRST: (sequences, ...), and the slots of first tokens are added to it.
    """
    slot, head = tl.program_id(0), tl.program_id(1) * HEADS
    if FIRST:
        slot += chunks
    row, begin, at, end = slot_of(slot, chunks, seqs, CHUNK)
    if at >= end:
        return
    KEPT: tl.constexpr = VALUE_WIDTH if OVER_KEY else KEY_WIDTH
    SUMMED: tl.constexpr = KEY_WIDTH if OVER_KEY else VALUE_WIDTH
    BLOCK: tl.constexpr = BLOCK_V if OVER_KEY else BLOCK_K
    BLOCK_BY: tl.constexpr = BLOCK_K if OVER_KEY else BLOCK_V
    time = tl.arange(0, CHUNK)
    present = (at + time < end) & (at + time >= 0)
    kept, token = tl.program_id(2) * BLOCK, begin + at
    if by is not None:
        by = locate.at(by, row, token, 0)
    acc = tl.zeros([CHUNK, HEADS * BLOCK], tl.float32)
    for s in range(0, SUMMED, BLOCK_BY):
        at_k = s if OVER_KEY else kept
        at_v = kept if OVER_KEY else s
        line, there = lines(
            head, at_k, at_v, slots, heads, KEY_WIDTH, VALUE_WIDTH, HEADS, BLOCK_K, BLOCK_V
        )
        place = (line + slot)[:, None] * CHUNK + time[None, :]
        x = tl.load(columns + place, mask=there[:, None] & (time >= 0)[None, :], other=0.0)
        x = tl.trans(x).to(tl.float32).reshape(CHUNK, HEADS, BLOCK_K, BLOCK_V)
        if by is not None:
            column, inside = channels(head, s, tl.arange(0, HEADS * BLOCK_BY), BLOCK_BY, SUMMED)
            inside = inside & (column < heads * SUMMED)
            mask = present[:, None] & inside[None, :]
            y = tl.load(by.data + time[:, None] * by.time + column[None, :], mask=mask, other=0.0)
            y = y.to(tl.float32)
            if OVER_KEY:
                x = x * y.reshape(CHUNK, HEADS, BLOCK_K, 1)
            else:
                x = x * y.reshape(CHUNK, HEADS, 1, BLOCK_V)
        if OVER_KEY:
            acc += tl.sum(x, 2).reshape(CHUNK, HEADS * BLOCK)
        else:
            acc += tl.sum(x, 3).reshape(CHUNK, HEADS * BLOCK)
    column, inside = channels(head, kept, tl.arange(0, HEADS * BLOCK), BLOCK, KEPT)
    mask = present[:, None] & (inside & (column < heads * KEPT))[None, :]
    output = locate.at(output, row, token, 0)
    place = time[:, None] * output.time + column[None, :]
    if FIRST:
        acc += tl.load(output.data + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(output.data + place, acc, mask=mask)
