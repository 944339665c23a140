"""Decay on GPUs: sums of its logs within a chunk, and the way back from their gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from supra.kernels import checks, locate, tiles
from supra.kernels.checks import LOWEST_LOG_DECAY
from supra.kernels.launch import Rows, Sequences, Tiling, launch

SMALL = Tiling(1, 1, 4, 1)


def sums_in_chunks(
    log_decay: Tensor | None, chunk: int, chunks: int, seqs: Sequences
) -> Rows | None:
    """Sums of the logs since the chunk began, in pairs of a number and its remainder.

    log_decay: [H], whose sums are the same in every chunk, or [B, T, H]; None for no sums. chunks:
    how many there are, or an upper bound.
    """
    if log_decay is None:
        return None
    heads = log_decay.shape[-1]
    if log_decay.dim() == 1:
        steps = torch.arange(1, chunk + 1, dtype=torch.float64, device=log_decay.device)
        exact = log_decay.double().clamp(min=LOWEST_LOG_DECAY)[:, None] * steps
        high = exact.float()
        return Rows(torch.stack((high, (exact - high).float()), -1), 0, 0, 2 * chunk)
    length, total = log_decay.shape[1], log_decay.shape[:2].numel()
    sums = log_decay.new_empty(heads, total, 2, dtype=torch.float32)
    launch(
        decay_sums, (chunks, heads), {}, SMALL, log_decay=Rows.of(log_decay), sums=sums, seqs=seqs,
        total=total, lowest=LOWEST_LOG_DECAY, CHUNK=chunk,
    )  # fmt: skip
    return Rows(sums, 2 * length, 2, 2 * total)


def d_log_decay(
    log_decay: Tensor | None,
    given: dict[str, object],
    query_products: Tensor | None,
    key_products: Tensor | None,
    carried: Tensor | None,
) -> Tensor | None:
    """Gradient of log_decay from q . dq, k . dk and <state, its gradient>, in blocks of channels.

    given: arguments of kernels that launches share.
    """
    if log_decay is None:
        return None
    length, heads = given["seqs"].length, log_decay.shape[-1]
    found = query_products.new_empty(query_products.shape[-1] // length, length, heads)
    launch(
        chunk_d_log_decay, (given["chunks"], heads), given, SMALL, query_products=query_products,
        key_products=key_products, carried=carried, d_log_decay=found, heads=heads,
        query_blocks=len(query_products), key_blocks=len(key_products), state_blocks=len(carried),
    )  # fmt: skip
    return checks.d_log_decay(log_decay, found)


@triton.jit
def split_sum(x):
    """A float64 sum rounded to float32, and what that took off it, in float32 too.

    The difference of two sums is then as exact as a small sum is: with float32 sums alone, five
    resets of -104 in a chunk would leave the decay between two tokens 3e-5. What needs no
    difference reads the first number only.
    """
    high = x.to(tl.float32)
    return high, (x - high).to(tl.float32)


@triton.jit
def last_pair(sums, left, CHUNK: tl.constexpr):
    """The pair of sums at the last token of a chunk; left: tokens of its sequence from it on."""
    last = sums.data + tl.minimum(left, CHUNK) * 2 - 2
    return tl.load(last), tl.load(last + 1)


@triton.jit
def entering_decay(own):
    """Decay from the begin of the chunk to the tokens whose pairs of sums are `own`."""
    return tl.exp(own[0] + own[1])


@triton.jit
def leaving_decay(own, last):
    """Decay from tokens to the end of the chunk, `last`."""
    return tl.exp((last[0] - own[0]) + (last[1] - own[1]))


@triton.jit
def difference(rows, columns):
    """Pairs of sums at the tokens of the rows less those at the columns, [rows, columns]."""
    high = rows[0][:, None] - columns[0][None, :]
    return high + (rows[1][:, None] - columns[1][None, :])


@triton.jit
def decay_between(own):
    """exp(-|G_i - G_j|): D below the diagonal, its transpose above, and never more than 1.

    own: the pairs of sums at the tokens of the chunk.
    """
    return tl.exp(-tl.abs(difference(own, own)))


@triton.jit
def decay_sums(log_decay, sums, seqs, total, lowest, CHUNK: tl.constexpr):
    """Sums of log_decay since the chunk began, [Hs, B * T, 2], for a decay per token.

    grid: (chunks, Hs). The second number is the remainder that float32 would lose, see split_sum.
    """
    _, _, head, _, row, token, left, rows, _ = locate.chunk(seqs, 1, 1, CHUNK)
    if left <= 0:
        return
    log_decay = locate.at(log_decay, row, token, head)
    x = tiles.load_numbers(log_decay, rows, left).to(tl.float64)
    high, low = split_sum(tl.cumsum(tl.maximum(x, lowest), 0))
    base = sums + locate.lane_offset(head, total, row, token, seqs.length) * 2
    tiles.store_pairs(base, rows, left, high, low)


@triton.jit
def chunk_d_log_decay(
    query_products, key_products, carried, d_log_decay, seqs, heads, total, chunks, query_blocks,
    key_blocks, state_blocks, CHUNK: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Gradient of the log of every token's decay [B * T, Hs]; heads = Hs. grid: (chunks, Hs).

    A chunk at a time: sums over a whole sequence would cancel digits that a long text has not got.
    """
    chunk, _, head, _, row, token, left, rows, _ = locate.chunk(seqs, 1, 1, CHUNK)
    if left <= 0:
        return
    place = row * tl.cast(seqs.length, tl.int64) + token
    d_sums = tl.zeros([CHUNK], tl.float32)
    for block in range(0, query_blocks):
        for r in range(0, QUERIES):
            lane = (block * heads + head) * QUERIES + r
            base = query_products + lane * tl.cast(total, tl.int64) + place
            d_sums += tiles.load_vector(base, 1, rows, left)
    for block in range(0, key_blocks):
        base = key_products + (block * heads + head) * tl.cast(total, tl.int64) + place
        d_sums -= tiles.load_vector(base, 1, rows, left)
    found = tl.cumsum(d_sums, 0, reverse=True)
    for block in range(0, state_blocks):
        base = carried + (block * heads + head) * tl.cast(chunks, tl.int64)
        found += tl.load(base + chunk)
    tl.store(d_log_decay + (place + rows) * heads + head, found, mask=rows < left)
