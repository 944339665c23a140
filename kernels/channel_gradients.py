"""Triton kernels of the gradients of queries, keys, values and a decay per key channel.

Legend as in channel_scores.py. d_scores are the gradients of the scores, with the scale in them.
The gradient of a decay is summed over the pairs of tokens that it lies between, by products with
matrices of zeros and ones: the usual difference of running sums of q dq and k dk would cancel, and
what is left of 16-bit products is then mostly their rounding.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.channel_decay import (
    before_here,
    boundary_decay,
    crosses,
    entering_decay,
    from_here_on,
    leaving_decay,
)
from supra.kernels.launch import Rows


@triton.jit
def chunk_d_scores(
    value, d_output, d_scores, seqs, heads, scale, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, STRICT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores; heads = Hq. grid: (chunks, Hq).

    STRICT: of those with the tokens before; else with later ones too, which nobody reads.
    """
    _, _, head, _, row, token, left, rows, _ = locate.chunk(seqs, 1, 1, TILE)
    if left <= 0:
        return
    value = locate.at(value, row, token, head // QUERIES)
    d_output = locate.at(d_output, row, token, head)
    found = tiles.products(d_output, left, value, left, rows, VALUE_WIDTH, BLOCK_V, PRECISION)
    if STRICT:
        found = tl.where(rows[:, None] > rows[None, :], found, 0.0)
    base = d_scores + locate.dense_offset(row, token, seqs.length, head, heads, TILE)
    tiles.store(base, heads * TILE, rows, left, rows, TILE, tiles.narrow(found * scale, PRECISION))


@triton.jit
def chunk_d_query(
    query, key, d_output, sums, bonus, states, d_scores, d_query, d_logs, d_bonus, seqs, heads,
    scale, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, LEVELS: tl.constexpr,
    HAS_BONUS: tl.constexpr, OF_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, its part of the gradient of log_decay, and that of bonus per chunk; heads = Hq.

    grid: (chunks * blocks of K, Hq). d_logs [B, T, Hq, K], d_bonus [chunks, Hq, K]. OF_KEYS: the
    queries are the keys, strictly before their own tokens, and this is the gradient of both.
    """
    chunk, _, head, n, row, token, left, rows, columns = locate.chunk(
        seqs, KEY_WIDTH, BLOCK_K, TILE
    )
    if left <= 0:
        return
    kv_heads, kv_head = heads // QUERIES, head // QUERIES
    query = locate.at(query, row, token, head)
    key = locate.at(key, row, token, kv_head)
    d_output = locate.at(d_output, row, token, head)
    sums = locate.dense(sums, row, token, kv_head, kv_heads, seqs, KEY_WIDTH)
    states += locate.slot_offset(chunk + n, kv_head, kv_heads, KEY_WIDTH * VALUE_WIDTH)

    acc = tiles.state_products(
        d_output, left, states, rows, columns, KEY_WIDTH, VALUE_WIDTH, BLOCK_V, PRECISION
    )
    acc *= scale * entering_decay(sums, rows, left, columns, KEY_WIDTH, HAS_BONUS)
    q = tiles.load_rows(query, rows, left, columns, KEY_WIDTH)
    logs = tl.zeros([TILE, BLOCK_K], tl.float32)
    logs = tiles.dot(from_here_on(rows, TILE, HAS_BONUS), q * acc, logs, PRECISION)

    # in the loop q and k are loaded again: kept, they cost registers that then spill
    d_scores += locate.dense_offset(row, token, seqs.length, head, heads, TILE)
    ds = tiles.load(d_scores, heads * TILE, rows, left, rows, TILE)
    if OF_KEYS:
        ds += tl.trans(ds)
    for level in range(0, LEVELS):
        size = 1 << level
        k = tiles.load_rows(key, rows, left, columns, KEY_WIDTH)
        decay = boundary_decay(sums, rows, left, columns, size, KEY_WIDTH, HAS_BONUS)
        meet = crosses(rows[:, None], rows[None, :], size)
        if OF_KEYS:
            meet |= crosses(rows[None, :], rows[:, None], size)
        block_ds = tl.where(meet, ds, 0.0)
        found = tiles.dot(block_ds, k * decay, tl.zeros_like(acc), PRECISION) * decay
        acc += found
        q = tiles.load_rows(query, rows, left, columns, KEY_WIDTH)
        between = from_here_on(rows, size, HAS_BONUS)
        if OF_KEYS:
            between = tl.where((rows & size)[None, :] != 0, between, before_here(rows, size))
        logs = tiles.dot(between, q * found, logs, PRECISION)

    k = tiles.load_rows(key, rows, left, columns, KEY_WIDTH)
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], ds.to(tl.float32), 0.0), 1)
    if HAS_BONUS:
        u = tiles.load_vector(bonus + head * KEY_WIDTH, 1, columns, KEY_WIDTH).to(tl.float32)
        base = d_bonus + locate.slot_offset(chunk, head, heads, KEY_WIDTH)
        tiles.store_vector(base, columns, KEY_WIDTH, tl.sum(own[:, None] * q * k, 0))
        acc += own[:, None] * k * u[None, :]
    else:
        acc += own[:, None] * k
    at = locate.dense_offset(row, token, seqs.length, head, heads, KEY_WIDTH)
    tiles.store(d_query + at, heads * KEY_WIDTH, rows, left, columns, KEY_WIDTH, acc)
    tiles.store(d_logs + at, heads * KEY_WIDTH, rows, left, columns, KEY_WIDTH, logs)


@triton.jit
def chunk_d_key(
    query, key, value, sums, bonus, d_states, d_scores, d_whole, d_query_logs, d_key, d_log_decay,
    d_reading, d_reading_logs, seqs, heads, chunks, value_blocks, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    QUERIES: tl.constexpr, LEVELS: tl.constexpr, HAS_BONUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and the gradient of log_decay; heads = Hkv. grid: (chunks * blocks of K, Hkv).

    d_reading, d_reading_logs: what chunk_d_query gave for the keys, which is added, or None.
    """
    chunk, _, head, _, row, token, left, rows, columns = locate.chunk(
        seqs, KEY_WIDTH, BLOCK_K, TILE
    )
    if left <= 0:
        return
    place = locate.dense_offset(row, token, seqs.length, head, heads, 1)
    query = locate.at(query, row, token, head * QUERIES)
    key = locate.at(key, row, token, head)
    value = locate.at(value, row, token, head)
    step = heads * KEY_WIDTH
    sums = Rows(sums + place * KEY_WIDTH, 0, step, 0)
    d_scores += place * QUERIES * TILE
    d_states += locate.slot_offset(chunk, head, heads, KEY_WIDTH * VALUE_WIDTH)

    acc = tiles.state_products(
        value, left, d_states, rows, columns, KEY_WIDTH, VALUE_WIDTH, BLOCK_V, PRECISION
    )
    acc *= leaving_decay(sums, rows, left, columns, KEY_WIDTH)
    k = tiles.load_rows(key, rows, left, columns, KEY_WIDTH)
    logs = _later_logs(
        d_whole, d_query_logs, place, chunk, head, heads, chunks, value_blocks, rows, left, columns,
        KEY_WIDTH, QUERIES,
    )  # fmt: skip
    if d_reading is not None:
        at = d_reading_logs + place * KEY_WIDTH
        logs += tiles.load(at, step, rows, left, columns, KEY_WIDTH)
    logs = tiles.dot(before_here(rows, TILE), k * acc, logs, PRECISION)

    for level in range(0, LEVELS):
        size = 1 << level
        decay = boundary_decay(sums, rows, left, columns, size, KEY_WIDTH, HAS_BONUS)
        found = tl.zeros([TILE, BLOCK_K], tl.float32)
        for r in range(0, QUERIES):
            q_at = locate.skip_heads(query, r)
            q = tiles.load_rows(q_at, rows, left, columns, KEY_WIDTH)
            ds = tiles.load(d_scores + r * TILE, heads * QUERIES * TILE, rows, left, rows, TILE)
            ds = tl.where(crosses(rows[:, None], rows[None, :], size), ds, 0.0)
            found = tiles.dot(tl.trans(ds), q * decay, found, PRECISION)
        found *= decay
        acc += found
        logs = tiles.dot(before_here(rows, size), k * found, logs, PRECISION)

    for r in range(0, QUERIES):
        q_at = locate.skip_heads(query, r)
        q = tiles.load_rows(q_at, rows, left, columns, KEY_WIDTH).to(tl.float32)
        own = tiles.load_vector(d_scores + r * TILE, heads * QUERIES * TILE + 1, rows, left)
        if HAS_BONUS:
            u = bonus + (head * QUERIES + r) * KEY_WIDTH
            q *= tiles.load_vector(u, 1, columns, KEY_WIDTH)[None, :]
        acc += own.to(tl.float32)[:, None] * q
    if d_reading is not None:
        acc += tiles.load(d_reading + place * KEY_WIDTH, step, rows, left, columns, KEY_WIDTH)
    tiles.store(d_key + place * KEY_WIDTH, step, rows, left, columns, KEY_WIDTH, acc)
    tiles.store(d_log_decay + place * KEY_WIDTH, step, rows, left, columns, KEY_WIDTH, logs)


@triton.jit
def _later_logs(
    d_whole, d_query_logs, place, chunk, head, heads, chunks, value_blocks, rows, left, columns,
    KEY_WIDTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Gradient of the logs of decay from the state after the chunk and from its queries."""
    carried = tl.zeros([columns.shape[0]], tl.float32)
    for i in range(0, value_blocks):
        slot = i * tl.cast(chunks, tl.int64) + chunk
        part = d_whole + locate.slot_offset(slot, head, heads, KEY_WIDTH)
        carried += tiles.load_vector(part, 1, columns, KEY_WIDTH)
    logs = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32) + carried[None, :]
    for r in range(0, QUERIES):
        part = d_query_logs + (place * QUERIES + r) * KEY_WIDTH
        logs += tiles.load(part, heads * KEY_WIDTH * QUERIES, rows, left, columns, KEY_WIDTH)
    return logs


@triton.jit
def chunk_d_written(
    key, d_output, sums, scores, d_states, d_written, seqs, heads, scale,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of what tokens write, of values or errors; heads = Hkv.

    grid: (chunks * blocks of V, Hkv). It comes from the outputs of their own chunk, and from the
    state after it where d_states are given.
    """
    chunk, _, head, _, row, token, left, rows, columns_v = locate.chunk(
        seqs, VALUE_WIDTH, BLOCK_V, TILE
    )
    if left <= 0:
        return
    place = locate.dense_offset(row, token, seqs.length, head, heads, 1)
    key = locate.at(key, row, token, head)
    d_output = locate.at(d_output, row, token, head * QUERIES)
    sums = Rows(sums + place * KEY_WIDTH, 0, heads * KEY_WIDTH, 0)
    scores += place * QUERIES * TILE
    if d_states is not None:
        d_states += locate.slot_offset(chunk, head, heads, KEY_WIDTH * VALUE_WIDTH)

    acc = tl.zeros([TILE, BLOCK_V], tl.float32)
    for r in range(0, QUERIES):
        a = tiles.load(scores + r * TILE, heads * QUERIES * TILE, rows, left, rows, TILE)
        d_at = locate.skip_heads(d_output, r)
        do = tiles.load_rows(d_at, rows, left, columns_v, VALUE_WIDTH)
        acc = tiles.dot(tl.trans(a), do, acc, PRECISION)
    acc *= scale
    if d_states is not None:
        for k0 in range(0, KEY_WIDTH, BLOCK_K):
            columns = k0 + tl.arange(0, BLOCK_K)
            k = tiles.load_rows(key, rows, left, columns, KEY_WIDTH)
            k *= leaving_decay(sums, rows, left, columns, KEY_WIDTH)
            s = tiles.load_state(d_states, columns, columns_v, KEY_WIDTH, VALUE_WIDTH)
            acc = tiles.dot(k, s, acc, PRECISION)
    kept, d_written = tiles.narrow(acc, PRECISION), d_written + place * VALUE_WIDTH
    tiles.store(d_written, heads * VALUE_WIDTH, rows, left, columns_v, VALUE_WIDTH, kept)
