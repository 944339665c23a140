"""The likelihood of texts. What neighbouring texts share at their beginning is read once."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from supra.data.packing import IGNORE
from supra.losses.token_losses import next_token_nats
from supra.model.cache import cache_in
from supra.model.offload import device_of

# Tokens of prompts per forward pass. The cache is then repeated for every continuation.
BATCH_TOKENS = 2048


class Row(NamedTuple):
    """The token ids of a text, and how many of its last ones are scored (>= 1)."""

    tokens: list[int]
    scored: int


class Score(NamedTuple):
    """How likely a model finds the scored tokens of one row."""

    log_likelihood: float  # nats, summed over the tokens
    greedy: bool  # greedy decoding would give exactly these tokens


class Scores(NamedTuple):
    """Scores of N prompts with C continuations each."""

    log_likelihood: Tensor  # [N, C] float32, nats, summed over the continuation's tokens
    greedy: Tensor  # bool [N, C]: greedy decoding would give exactly this continuation


class _Shared(NamedTuple):
    """What a model makes of the tokens that each of G groups shares. The last K are scored."""

    cache: dict[str, Cache]  # by the name in which the model takes it
    mask: Tensor  # [G, T] int64, 0 at the padding on the left
    lengths: Tensor  # [G] int64
    last: Tensor  # [G, V], the logits after the last token
    nats: Tensor  # [G, K], of the last K tokens
    greedy: Tensor  # bool [G, K]


def score_continuations(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    continuations: Sequence[Sequence[list[int]]],
) -> Scores:
    """Score the continuations of each prompt. All are token ids; every prompt has equally many
    continuations."""
    groups = [
        [Row([*prompt, *continuation], len(continuation)) for continuation in some]
        for prompt, some in zip(prompts, continuations, strict=True)
    ]
    batch = max(1, BATCH_TOKENS // max(map(len, prompts))) * len(continuations[0])
    found = score_groups(model, groups, batch)
    return Scores(
        torch.tensor([[score.log_likelihood for score in some] for some in found]),
        torch.tensor([[score.greedy for score in some] for some in found]),
    )


def group_rows(rows: Iterable[Row]) -> list[list[Row]]:
    """Neighbours that begin alike, in the order of the rows.

    A row joins the group before it if the group shares at least half of the row's tokens.
    """
    groups, shared = [], 0
    for row in rows:
        common = min(shared, _common(groups[-1][0].tokens, row.tokens)) if groups else 0
        if groups and 2 * common >= len(row.tokens):
            groups[-1].append(row)
            shared = common
        else:
            groups.append([row])
            shared = len(row.tokens)
    return groups


def score_groups(
    model: PreTrainedModel,
    groups: Sequence[Sequence[Row]],
    batch: int,
    bar: tqdm | None = None,
) -> list[list[Score]]:
    """The score of every row. The tokens that all rows of a group begin with are read once.

    Args:
        batch: rows of a forward pass. Scores do not depend on it.
        bar: counts the rows.
    """
    longest = [max(len(row.tokens) for row in group) for group in groups]
    order = sorted(range(len(groups)), key=lambda at: -longest[at])  # similar lengths, less padding
    found: dict[int, list[Score]] = {}
    if bar is not None:
        bar.reset(total=sum(map(len, groups)))
    for some in _batches(order, [len(group) for group in groups], batch):
        scores = iter(_score(model, [groups[at] for at in some], batch))
        for at in some:
            found[at] = [next(scores) for _ in groups[at]]
            if bar is not None:
                bar.update(len(groups[at]))
    return [found[at] for at in range(len(groups))]


def fork_cache(cache: Cache, rows: Tensor) -> Cache:
    """A copy of any model's cache that holds these rows of it; the original stays as it is.

    rows: int64 [M], and a row may occur several times.
    """
    fork = copy.deepcopy(cache)
    fork.reorder_cache(rows)
    return fork


def _batches(order: Sequence[int], sizes: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Groups that are read together: `batch` rows at most, or a single group."""
    some, rows = [], 0
    for at in order:
        if some and rows + sizes[at] > batch:
            yield some
            some, rows = [], 0
        some.append(at)
        rows += sizes[at]
    if some:
        yield some


@torch.no_grad()
def _score(model: PreTrainedModel, groups: Sequence[Sequence[Row]], batch: int) -> list[Score]:
    """The scores of all rows of the groups, one after another."""
    lengths = [_shared_length(group) for group in groups]
    rows = [(at, row) for at, group in enumerate(groups) for row in group]
    shared = _read_shared(
        model,
        [group[0].tokens[:length] for group, length in zip(groups, lengths, strict=True)],
        scored=max(_scored_within(row, lengths[at]) for at, row in rows),
        goes_on=any(len(row.tokens) > lengths[at] + 1 for at, row in rows),
    )
    parts = (rows[start : start + batch] for start in range(0, len(rows), batch))
    return [score for part in parts for score in _score_rest(model, shared, part)]


def _read_shared(
    model: PreTrainedModel, prefixes: Sequence[list[int]], scored: int, goes_on: bool
) -> _Shared:
    lengths = torch.tensor([len(prefix) for prefix in prefixes])
    ids, mask = _left_padded(prefixes, lengths)
    device = device_of(model)
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
        use_cache=goes_on,
        logits_to_keep=scored + 1,
    )
    before, last = output.logits[:, :-1], output.logits[:, -1]
    labels = ids[:, ids.shape[1] - before.shape[1] :].to(before.device)
    nats = next_token_nats(before.flatten(0, 1), labels.flatten()) if scored else labels.float()
    cache = cache_in(output) if goes_on else {}
    return _Shared(cache, mask, lengths, last, nats.view_as(labels), before.argmax(-1) == labels)


def _score_rest(
    model: PreTrainedModel, shared: _Shared, rows: Sequence[tuple[int, Row]]
) -> list[Score]:
    """The scores of some rows, each with the number of its group."""
    groups, device = torch.tensor([at for at, _ in rows]), device_of(model)
    mask, lengths = shared.mask[groups], shared.lengths[groups]
    rest = [row.tokens[length:] for (_, row), length in zip(rows, lengths.tolist(), strict=True)]
    ids = _right_padded(rest)  # [M, L]
    logits = shared.last[groups.to(shared.last.device)][:, None]
    if ids.shape[1] > 1:
        given = ids[:, :-1].clamp(min=0)
        at = groups.to(device)
        more = model(
            input_ids=given.to(device),
            attention_mask=torch.cat([mask, torch.ones_like(given)], dim=1).to(device),
            position_ids=(lengths[:, None] + torch.arange(given.shape[1])).to(device),
            use_cache=True,
            **{name: fork_cache(cache, at) for name, cache in shared.cache.items()},
        )
        logits = torch.cat([logits, more.logits], dim=1)
    scored = torch.tensor([row.scored for _, row in rows])
    ends = torch.tensor([len(tokens) for tokens in rest])
    unscored = torch.arange(ids.shape[1]) < (ends - scored)[:, None]
    labels = ids.masked_fill(unscored, IGNORE).to(logits.device)
    nats = next_token_nats(logits.flatten(0, 1), labels.flatten()).view_as(labels)
    hits = (logits.argmax(-1) == labels) | (labels == IGNORE)
    # the tokens among the shared ones that count for this row
    groups, width = groups.to(logits.device), shared.nats.shape[1]
    counts = (torch.arange(width) >= width - (scored - ends)[:, None]).to(logits.device)
    nats = nats.sum(1) + (shared.nats[groups] * counts).sum(1)
    greedy = hits.all(1) & (shared.greedy[groups] | ~counts).all(1)
    return [Score(-x, hit) for x, hit in zip(nats.tolist(), greedy.tolist(), strict=True)]


def _shared_length(group: Sequence[Row]) -> int:
    """The number of tokens that the rows begin with, and of the shortest row all but the last."""
    first = group[0].tokens
    common = min(_common(first, row.tokens) for row in group)
    return min(common, min(len(row.tokens) for row in group) - 1)


def _scored_within(row: Row, length: int) -> int:
    """How many of the first `length` tokens of a row are scored."""
    return max(0, row.scored - (len(row.tokens) - length))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that two texts begin with."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def _left_padded(rows: Sequence[list[int]], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask, [N, T] int64. The padding token does not matter."""
    width = int(lengths.max())
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, (torch.arange(width) >= (width - lengths)[:, None]).long()


def _right_padded(rows: Sequence[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [IGNORE] * (width - len(row)) for row in rows])
