"""The likelihood of continuations of prompts. Every prompt is read once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from supra.data.packing import IGNORE
from supra.losses.token_losses import next_token_nats

# Tokens of prompts per forward pass. The cache is then repeated for every continuation.
BATCH_TOKENS = 2048


class Scores(NamedTuple):
    """Scores of N prompts with C continuations each."""

    log_likelihood: Tensor  # [N, C] float32, nats, summed over the continuation's tokens
    greedy: Tensor  # bool [N, C]: greedy decoding would give exactly this continuation


def score_continuations(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    continuations: Sequence[Sequence[list[int]]],
) -> Scores:
    """Score the continuations of each prompt. All are token ids; every prompt has equally many
    continuations."""
    rows = max(1, BATCH_TOKENS // max(map(len, prompts)))
    parts = [
        _score(model, prompts[start : start + rows], continuations[start : start + rows])
        for start in range(0, len(prompts), rows)
    ]
    return Scores(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def _score(
    model: PreTrainedModel, prompts: Sequence[list[int]], continuations: Sequence[Sequence[list]]
) -> Scores:
    count = len(continuations[0])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids, mask = _left_padded(prompts, lengths)
    output = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
        use_cache=True,
        logits_to_keep=1,
    )
    labels = _right_padded([x for some in continuations for x in some])  # [N·C, L]
    logits = output.logits.repeat_interleave(count, dim=0)
    if labels.shape[1] > 1:
        cache = output.past_key_values
        cache.batch_repeat_interleave(count)
        mask, lengths = (x.repeat_interleave(count, dim=0) for x in (mask, lengths))
        given = labels[:, :-1].clamp(min=0)
        more = model(
            input_ids=given.to(model.device),
            attention_mask=torch.cat([mask, torch.ones_like(given)], dim=1).to(model.device),
            position_ids=(lengths[:, None] + torch.arange(given.shape[1])).to(model.device),
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([logits, more.logits], dim=1)
    labels = labels.to(logits.device)
    nats = next_token_nats(logits.flatten(0, 1), labels.flatten()).view_as(labels)
    greedy = ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(1)
    return Scores(-nats.sum(1).view(-1, count).cpu(), greedy.view(-1, count).cpu())


def _left_padded(rows: Sequence[list[int]], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask, [N, T] int64. The padding token does not matter."""
    width = int(lengths.max())
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, (torch.arange(width) >= (width - lengths)[:, None]).long()


def _right_padded(rows: Sequence[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [IGNORE] * (width - len(row)) for row in rows])
