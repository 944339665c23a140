"""Perplexity over fixed blocks of tokens, as a whole and by position in the document."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from supra.data.packing import IGNORE, Block, collate, shifted_labels
from supra.errors import UserError
from supra.losses.token_losses import next_token_nats
from supra.model.native.adapter import documents_apart
from supra.model.offload import device_of


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text, as a whole and by position in the document."""

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    tokens: int  # predicted tokens
    by_position: list[tuple[int, int, float]]  # (start, end, perplexity), end not included


def perplexity(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    *,
    by_position: Sequence[int] | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """Next-token loss of `model` on `blocks`. All predicted tokens have the same weight.

    Args:
        blocks: from `blocks_from_text` or training's held-out text, all of the same length.
        by_position: ascending edges such as (0, 512, 1024). The result then also has the perplexity
            by position in the document: the number of tokens of the same document before a token in
            its block, including start tokens. Ranges without tokens are left out.
        batch_size: blocks per forward pass; the results do not depend on it.
    """
    parts = list(token_nats(model, blocks, batch_size))
    nats, positions = (torch.cat(part) for part in zip(*parts, strict=True))
    return _summary(nats, positions, by_position or ())


@torch.no_grad()
def token_nats(
    model: PreTrainedModel, blocks: Sequence[Block], batch_size: int = 8
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each block, what its predicted tokens cost and where they stand.

    Two tensors [n]: nats, float64, and the position in the document, int64. Raises UserError when
    there are no blocks.
    """
    if not blocks:
        raise UserError("perplexity needs at least one block of text")
    device = device_of(model)
    was_training = model.training
    model.eval()
    for start in range(0, len(blocks), batch_size):
        batch = collate(blocks[start : start + batch_size])
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
        with documents_apart(model, inputs["position_ids"]):
            logits = model(**inputs, use_cache=False).logits
        labels = shifted_labels(batch["labels"])
        nats = next_token_nats(logits.flatten(0, 1), labels.flatten().to(device)).cpu().double()
        del logits
        positions = batch["position_ids"] + 1
        for row, at, label in zip(nats.view_as(labels), positions, labels, strict=True):
            yield row[label != IGNORE], at[label != IGNORE]
    model.train(was_training)


def _summary(nats: torch.Tensor, positions: torch.Tensor, edges: Sequence[int]) -> Perplexity:
    loss = nats.mean().item()
    ranges = []
    for start, end in pairwise(edges):
        inside = nats[(positions >= start) & (positions < end)]
        if len(inside):
            ranges.append((start, end, perplexity_of(inside.mean().item())))
    return Perplexity(loss, perplexity_of(loss), len(nats), ranges)


def perplexity_of(loss: float) -> float:
    """exp(loss), of a loss in nats per token; infinity if it is too large for a float64."""
    return math.exp(loss) if loss < 709 else math.inf
