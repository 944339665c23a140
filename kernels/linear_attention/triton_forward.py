"""Triton kernels of linear attention: states, outputs, and the recurrent form.

Legend: Hq query heads, Hs state heads, Hkv key heads; QUERIES = Hq / Hs, STATES = Hs / Hkv. Rows of
a tile are tokens. The state before chunk c of sequence n lies in slot c + n of `states`, so that
each sequence has one slot more than chunks, for the state after it.
"""

import triton
import triton.language as tl

from supra.kernels import locate, tiles
from supra.kernels.decay import difference, entering_decay, last_pair, leaving_decay


@triton.jit
def decayed(scores, seen, own, sums, t, rows, left, OWN_LATER: tl.constexpr):
    """Scores with the decay between their tokens, zero where not `seen`.

    own: pairs of sums at the tokens of the rows, which come after those of the columns, or before.
    The columns are the tile from token t of the chunk on.
    """
    if sums is not None:
        logs = difference(own, tiles.load_pairs(sums.data + t * 2, rows, left - t))
        logs = logs if OWN_LATER else -logs
        return scores * tl.exp(tl.where(seen, logs, float("-inf")))
    else:
        return tl.where(seen, scores, 0.0)


@triton.jit
def store_both(
    states, normalizers, slot, heads, state, normalizer, columns_k, columns_v, block_v,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of a state in its slot, and of the normalizer, which the first block of V stores.

    states and normalizers: those of one head, which has `heads` of them in a slot. Their step is a
    product of its own: with slot * heads first, loops over slots take up to 54 registers more.
    """
    step = tl.cast(heads, tl.int64)
    states += slot * (step * (KEY_WIDTH * VALUE_WIDTH))
    tiles.store_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, state)
    if normalizers is not None and block_v == 0:
        normalizers += slot * (step * KEY_WIDTH)
        tiles.store_vector(normalizers, columns_k, KEY_WIDTH, normalizer)


@triton.jit
def chunk_states(
    key, value, sums, memory, normalizer, states, normalizers, end_memory, end_normalizer, seqs,
    heads,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States before every chunk and after the last, one block [BLOCK_K, BLOCK_V] a program.

    grid: (N * Hs * blocks,). Keys are scaled by the decay to the end of their chunk, since they
    serve the state and the normalizer both.
    """
    lane, n, head, _, block_v, columns_k, columns_v = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    rows = tl.arange(0, TILE)
    row, begin, tokens, first = locate.sequence(n, seqs, CHUNK)
    key = locate.at(key, row, begin, head // STATES)
    value = locate.at(value, row, begin, head // STATES)
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    z = tl.zeros([BLOCK_K], tl.float32)
    if memory is not None:
        base = memory + lane * (KEY_WIDTH * VALUE_WIDTH)
        acc = tiles.load_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
        if normalizers is not None:
            z = tiles.load_vector(normalizer + lane * KEY_WIDTH, 1, columns_k, KEY_WIDTH)
    if sums is not None:
        sums = locate.at(sums, row, begin, head)
    states += locate.slot_offset(first + n, head, heads, KEY_WIDTH * VALUE_WIDTH)
    if normalizers is not None:
        normalizers += locate.slot_offset(first + n, head, heads, KEY_WIDTH)

    count = tl.cdiv(tokens, CHUNK)
    for c in range(0, count):
        store_both(
            states, normalizers, c, heads, tiles.narrow(acc, PRECISION), z,
            columns_k, columns_v, block_v, KEY_WIDTH, VALUE_WIDTH,
        )  # fmt: skip
        if sums is not None:
            sums_c = locate.skip(sums, tl.cast(c * CHUNK, tl.int64))
            last = last_pair(sums_c, tokens - c * CHUNK, CHUNK)
            whole = entering_decay(last)
            acc *= whole
            if normalizers is not None:
                z *= whole
        for t in range(0, CHUNK, TILE):
            at = c * CHUNK + t
            k_at = locate.skip(key, tl.cast(at, tl.int64))
            k = tiles.load_rows(k_at, rows, tokens - at, columns_k, KEY_WIDTH)
            v_at = locate.skip(value, tl.cast(at, tl.int64))
            v = tiles.load_rows(v_at, rows, tokens - at, columns_v, VALUE_WIDTH)
            if sums is not None:
                own = tiles.load_pairs(sums_c.data + t * 2, rows, tokens - at)
                k = k * leaving_decay(own, last)[:, None]
            if normalizers is not None:
                z += tl.sum(k.to(tl.float32), 0)
            acc = tiles.dot(tl.trans(k), v, acc, PRECISION)

    store_both(
        states, normalizers, count, heads, tiles.narrow(acc, PRECISION), z,
        columns_k, columns_v, block_v, KEY_WIDTH, VALUE_WIDTH,
    )  # fmt: skip
    if end_memory is not None:
        store_both(
            end_memory, end_normalizer, lane, 1, acc, z, columns_k, columns_v, block_v,
            KEY_WIDTH, VALUE_WIDTH,
        )  # fmt: skip


@triton.jit
def chunk_output(
    query, key, value, sums, states, normalizers, output, weights, seqs, heads, scale, eps,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output tiles [TILE, BLOCK_V], and the sums of the weights; heads = Hq.

    grid: (chunks * CHUNK / TILE * blocks of V, Hq).
    """
    chunk, part, at, block, head, n, row, token, left, _, _ = locate.tile(
        seqs, VALUE_WIDTH, BLOCK_V, CHUNK, TILE
    )
    if at >= left:
        return
    # made before the return, rows and columns take up to 10 more registers, here and in backward
    rows, columns_v = tl.arange(0, TILE), block * BLOCK_V + tl.arange(0, BLOCK_V)
    state_head = head // QUERIES
    kv_head = state_head // STATES
    query = locate.at(query, row, token + at, head)
    key = locate.at(key, row, token, kv_head)
    value = locate.at(value, row, token, kv_head)
    slot = locate.slot_offset(chunk + n, state_head, heads // QUERIES, 1)
    acc, weight = _read_state(
        query, states, normalizers, slot, rows, left - at, columns_v,
        KEY_WIDTH, VALUE_WIDTH, BLOCK_K, PRECISION,
    )  # fmt: skip
    own = 0.0
    if sums is not None:
        sums = locate.at(sums, row, token, state_head)
        own = tiles.load_pairs(sums.data + at * 2, rows, left - at)
        entering = entering_decay(own)
        acc *= entering[:, None]
        weight *= entering

    for j in range(0, part + 1):
        t = j * TILE
        scores = tiles.products(
            query, left - at, locate.skip(key, t), left - t, rows, KEY_WIDTH, BLOCK_K, PRECISION
        )
        past = (at + rows)[:, None] >= (t + rows)[None, :]
        scores = decayed(scores, past, own, sums, t, rows, left, True)
        weight += tl.sum(scores, 1)
        v = tiles.load_rows(locate.skip(value, t), rows, left - t, columns_v, VALUE_WIDTH)
        acc = tiles.dot(scores, v, acc, PRECISION)

    # stored by rows of the chunk, here and in backward: by those of the tile, 36 more registers
    if weights is not None:
        if block == 0:
            base = weights + locate.dense_offset(row, token, seqs.length, head, heads, 1)
            tl.store(base + (at + rows) * heads, weight, mask=at + rows < left)
        acc /= (weight + eps)[:, None]
    else:
        acc *= scale
    base = output + locate.dense_offset(row, token, seqs.length, head, heads, VALUE_WIDTH)
    tiles.store(base, heads * VALUE_WIDTH, at + rows, left, columns_v, VALUE_WIDTH, acc)


@triton.jit
def _read_state(
    query, states, normalizers, slot, rows, end, columns_v, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of queries with a state [rows, columns_v], and with its normalizer [rows]."""
    acc = tl.zeros([rows.shape[0], columns_v.shape[0]], tl.float32)
    weight = tl.zeros([rows.shape[0]], tl.float32)
    states += slot * (KEY_WIDTH * VALUE_WIDTH)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns_k = k0 + tl.arange(0, BLOCK_K)
        q = tiles.load_rows(query, rows, end, columns_k, KEY_WIDTH)
        s = tiles.load_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
        acc = tiles.dot(q, s, acc, PRECISION)
        if normalizers is not None:
            z = tiles.load_vector(normalizers + slot * KEY_WIDTH, 1, columns_k, KEY_WIDTH)
            weight += tl.sum(q.to(tl.float32) * z[None, :], 1)
    return acc, weight
