"""Perplexity of articles by position: how well a model predicts text, and how it uses context."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.data.blocks import blocks_from_text
from supra.evaluate.perplexity import token_nats
from supra.evaluate.suite.data import evenly
from supra.evaluate.suite.measure import PERPLEXITY, Measure
from supra.evaluate.text_perplexity import position_edges
from supra.model.positions import check_positions

PART = "wikitext"
SEQUENCE_LENGTH = 1024


def measure_wikitext(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None,
    sequence_length: int,
    batch: int,
    bar: tqdm | None = None,
) -> list[Measure]:
    """Perplexity of packed rows of `sequence_length` tokens, as a whole and by position.

    The rows are those of `supra eval text`. The last range of positions stands for the use of a
    long context; the others are details.
    """
    check_positions(model, "--sequence-length", sequence_length)
    blocks = blocks_from_text(tokenizer, texts, sequence_length)
    blocks = [blocks[at] for at in evenly(len(blocks), limit)]
    rows = []
    if bar is not None:
        bar.reset(total=len(blocks))
    for row in token_nats(model, blocks, batch):
        rows.append(row)
        if bar is not None:
            bar.update()
    ranges = list(pairwise(position_edges(sequence_length)))
    measures = [_measure("perplexity", rows, 0, sequence_length, detail=False)]
    for start, end in ranges if len(ranges) > 1 else ():
        name, detail = f"perplexity after {start} tokens", (start, end) != ranges[-1]
        measures.append(_measure(name, rows, start, end, detail))
    return [measure for measure in measures if measure.values]


def _measure(
    name: str,
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    start: int,
    end: int,
    detail: bool,
) -> Measure:
    """Over the tokens at positions from `start` to `end`, not included."""
    values, weights = [], []
    for nats, positions in rows:
        inside = nats[(positions >= start) & (positions < end)]
        if len(inside):
            values.append(inside.mean().item())
            weights.append(float(len(inside)))
    strata = [PART] * len(values)
    return Measure(PART, name, PERPLEXITY, values, weights, strata, detail=detail)
