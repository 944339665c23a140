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
def decayed(
    scores, seen, own, sums, t, rows, left, OWN_LATER: tl.constexpr, HAS_DECAY: tl.constexpr
):
    """Scores with the decay between their tokens, zero where not `seen`.

    own: pairs of sums at the tokens of the rows, which come after those of the columns, or before.
    The columns are the tile from token t of the chunk on.
    """
    if HAS_DECAY:
        logs = difference(own, tiles.load_pairs(sums + t * 2, rows, left - t))
        logs = logs if OWN_LATER else -logs
        return scores * tl.exp(tl.where(seen, logs, float("-inf")))
    else:
        return tl.where(seen, scores, 0.0)


@triton.jit
def store_both(
    states, normalizers, slot, heads, state, normalizer, columns_k, columns_v, block_v,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    """A block of a state in its slot, and of the normalizer, which the first block of V stores.

    states and normalizers: those of one head, which has `heads` of them in a slot. Their step is a
    product of its own: with slot * heads first, loops over slots take up to 54 registers more.
    """
    step = tl.cast(heads, tl.int64)
    states += slot * (step * (KEY_WIDTH * VALUE_WIDTH))
    tiles.store_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, state)
    if NORMALIZED and block_v == 0:
        normalizers += slot * (step * KEY_WIDTH)
        tiles.store_vector(normalizers, columns_k, KEY_WIDTH, normalizer)


@triton.jit
def chunk_states(
    key, value, sums, memory, normalizer, states, normalizers, end_memory, end_normalizer,
    cu_seqlens, chunk_offsets,
    key_batch, key_time, key_head, value_batch, value_time, value_head,
    sums_batch, sums_time, sums_head, length, heads,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STATES: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORMALIZED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_END: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States before every chunk and after the last, one block [BLOCK_K, BLOCK_V] a program.

    grid: (N * Hs * blocks,). Keys are scaled by the decay to the end of their chunk, since they
    serve the state and the normalizer both.
    """
    lane, n, head, _, block_v, columns_k, columns_v = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    rows = tl.arange(0, TILE)
    row, begin, tokens, first = locate.sequence(n, cu_seqlens, chunk_offsets, length, CHUNK, PACKED)
    key += locate.offset(row, key_batch, begin, key_time, head // STATES, key_head)
    value += locate.offset(row, value_batch, begin, value_time, head // STATES, value_head)
    key_step, value_step = tl.cast(key_time, tl.int64), tl.cast(value_time, tl.int64)
    acc = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    z = tl.zeros([BLOCK_K], tl.float32)
    if HAS_INITIAL:
        base = memory + lane * (KEY_WIDTH * VALUE_WIDTH)
        acc = tiles.load_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
        if NORMALIZED:
            z = tiles.load_vector(normalizer + lane * KEY_WIDTH, 1, columns_k, KEY_WIDTH)
    if HAS_DECAY:
        sums += locate.offset(row, sums_batch, begin, sums_time, head, sums_head)
    states += locate.slot_offset(first + n, head, heads, KEY_WIDTH * VALUE_WIDTH)
    if NORMALIZED:
        normalizers += locate.slot_offset(first + n, head, heads, KEY_WIDTH)

    count = tl.cdiv(tokens, CHUNK)
    for c in range(0, count):
        store_both(
            states, normalizers, c, heads, tiles.narrow(acc, PRECISION), z,
            columns_k, columns_v, block_v, KEY_WIDTH, VALUE_WIDTH, NORMALIZED,
        )  # fmt: skip
        if HAS_DECAY:
            sums_c = sums + c * CHUNK * tl.cast(sums_time, tl.int64)
            last = last_pair(sums_c, tokens - c * CHUNK, CHUNK)
            whole = entering_decay(last)
            acc *= whole
            if NORMALIZED:
                z *= whole
        for t in range(0, CHUNK, TILE):
            at = c * CHUNK + t
            k = tiles.load(key + at * key_step, key_time, rows, tokens - at, columns_k, KEY_WIDTH)
            v_at = value + at * value_step
            v = tiles.load(v_at, value_time, rows, tokens - at, columns_v, VALUE_WIDTH)
            if HAS_DECAY:
                own = tiles.load_pairs(sums_c + t * 2, rows, tokens - at)
                k = k * leaving_decay(own, last)[:, None]
            if NORMALIZED:
                z += tl.sum(k.to(tl.float32), 0)
            acc = tiles.dot(tl.trans(k), v, acc, PRECISION)

    store_both(
        states, normalizers, count, heads, tiles.narrow(acc, PRECISION), z,
        columns_k, columns_v, block_v, KEY_WIDTH, VALUE_WIDTH, NORMALIZED,
    )  # fmt: skip
    if HAS_END:
        store_both(
            end_memory, end_normalizer, lane, 1, acc, z, columns_k, columns_v, block_v,
            KEY_WIDTH, VALUE_WIDTH, NORMALIZED,
        )  # fmt: skip


@triton.jit
def chunk_output(
    query, key, value, sums, states, normalizers, output, weights, cu_seqlens, chunk_offsets,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, sums_batch, sums_time, sums_head,
    sequences, length, heads, scale, eps,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr,
    HAS_DECAY: tl.constexpr, NORMALIZED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output tiles [TILE, BLOCK_V], and the sums of the weights; heads = Hq.

    grid: (chunks * CHUNK / TILE * blocks of V, Hq).
    """
    chunk, part, at, block, head, n, row, token, left, _, _ = locate.tile(
        cu_seqlens, chunk_offsets, sequences, length, VALUE_WIDTH, BLOCK_V, CHUNK, TILE, PACKED
    )
    if at >= left:
        return
    # made before the return, rows and columns take up to 10 more registers, here and in backward
    rows, columns_v = tl.arange(0, TILE), block * BLOCK_V + tl.arange(0, BLOCK_V)
    state_head = head // QUERIES
    kv_head = state_head // STATES
    query += locate.offset(row, query_batch, token + at, query_time, head, query_head)
    key += locate.offset(row, key_batch, token, key_time, kv_head, key_head)
    value += locate.offset(row, value_batch, token, value_time, kv_head, value_head)
    slot = locate.slot_offset(chunk + n, state_head, heads // QUERIES, 1)
    acc, weight = _read_state(
        query, query_time, states, normalizers, slot, rows, left - at, columns_v,
        KEY_WIDTH, VALUE_WIDTH, BLOCK_K, NORMALIZED, PRECISION,
    )  # fmt: skip
    own = 0.0
    if HAS_DECAY:
        sums += locate.offset(row, sums_batch, token, sums_time, state_head, sums_head)
        own = tiles.load_pairs(sums + at * 2, rows, left - at)
        entering = entering_decay(own)
        acc *= entering[:, None]
        weight *= entering

    for j in range(0, part + 1):
        t = j * TILE
        scores = tiles.products(
            query, query_time, left - at, key + t * key_time, key_time, left - t, rows,
            KEY_WIDTH, BLOCK_K, PRECISION,
        )  # fmt: skip
        past = (at + rows)[:, None] >= (t + rows)[None, :]
        scores = decayed(scores, past, own, sums, t, rows, left, True, HAS_DECAY)
        weight += tl.sum(scores, 1)
        v = tiles.load(value + t * value_time, value_time, rows, left - t, columns_v, VALUE_WIDTH)
        acc = tiles.dot(scores, v, acc, PRECISION)

    # stored by rows of the chunk, here and in backward: by those of the tile, 36 more registers
    if NORMALIZED:
        if block == 0:
            base = weights + locate.dense_offset(row, token, length, head, heads, 1)
            tl.store(base + (at + rows) * heads, weight, mask=at + rows < left)
        acc /= (weight + eps)[:, None]
    else:
        acc *= scale
    base = output + locate.dense_offset(row, token, length, head, heads, VALUE_WIDTH)
    tiles.store(base, heads * VALUE_WIDTH, at + rows, left, columns_v, VALUE_WIDTH, acc)


@triton.jit
def _read_state(
    query, query_time, states, normalizers, slot, rows, end, columns_v,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    NORMALIZED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of queries with a state [rows, columns_v], and with its normalizer [rows]."""
    acc = tl.zeros([rows.shape[0], columns_v.shape[0]], tl.float32)
    weight = tl.zeros([rows.shape[0]], tl.float32)
    states += slot * (KEY_WIDTH * VALUE_WIDTH)
    for k0 in range(0, KEY_WIDTH, BLOCK_K):
        columns_k = k0 + tl.arange(0, BLOCK_K)
        q = tiles.load(query, query_time, rows, end, columns_k, KEY_WIDTH)
        s = tiles.load_state(states, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
        acc = tiles.dot(q, s, acc, PRECISION)
        if NORMALIZED:
            z = tiles.load_vector(normalizers + slot * KEY_WIDTH, 1, columns_k, KEY_WIDTH)
            weight += tl.sum(q.to(tl.float32) * z[None, :], 1)
    return acc, weight


@triton.jit
def recurrent_steps(
    query, key, value, log_decay, memory, normalizer, end_normalizer, output,
    query_batch, query_time, query_head, key_batch, key_time, key_head,
    value_batch, value_time, value_head, decay_batch, decay_time, decay_head,
    length, heads, scale, eps,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """The recurrence token by token with the state in registers; heads = Hs.

    grid: (N * Hs * blocks of V,). memory is updated in place: a program reads and writes its own
    block only. The normalizer, which all blocks of a head read, ends up in end_normalizer.
    """
    lane, n, head, _, block, columns_k, columns_v = locate.block_of_state(
        heads, KEY_WIDTH, VALUE_WIDTH, BLOCK_K, BLOCK_V
    )
    query += locate.offset(n, query_batch, 0, query_time, head * QUERIES, query_head) + columns_k
    key += locate.offset(n, key_batch, 0, key_time, head // STATES, key_head) + columns_k
    value += locate.offset(n, value_batch, 0, value_time, head // STATES, value_head) + columns_v
    output += (
        locate.dense_offset(n, 0, length, head * QUERIES, heads * QUERIES, VALUE_WIDTH) + columns_v
    )
    memory += lane * (KEY_WIDTH * VALUE_WIDTH)
    s = tiles.load_state(memory, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)
    if NORMALIZED:
        z = tiles.load_vector(normalizer + lane * KEY_WIDTH, 1, columns_k, KEY_WIDTH)
    for t in range(0, length):
        k = tiles.load_token(key, key_time, t, columns_k, KEY_WIDTH)
        v = tiles.load_token(value, value_time, t, columns_v, VALUE_WIDTH)
        if HAS_DECAY:
            g = tl.load(log_decay + locate.offset(n, decay_batch, t, decay_time, head, decay_head))
            a = tl.exp(g.to(tl.float32))
            s *= a
            if NORMALIZED:
                z *= a
        s += k[:, None] * v[None, :]
        if NORMALIZED:
            z += k
        for r in range(0, QUERIES):
            q_at = query + r * tl.cast(query_head, tl.int64)
            q = tiles.load_token(q_at, query_time, t, columns_k, KEY_WIDTH)
            out = tl.sum(q[:, None] * s, 0)
            if NORMALIZED:
                out /= tl.sum(q * z, 0) + eps
            else:
                out *= scale
            base = output + locate.dense_offset(0, t, length, r, heads * QUERIES, VALUE_WIDTH)
            tl.store(base, out, mask=columns_v < VALUE_WIDTH)
    tiles.store_state(memory, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH, s)
    if NORMALIZED and block == 0:
        tiles.store_vector(end_normalizer + lane * KEY_WIDTH, columns_k, KEY_WIDTH, z)
