"""Reads one long text with a recurrent model, in constant memory.

Nothing is kept of a token except its share in the sums of a few hundred buckets.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.data.packing import (
    IGNORE,
    check_tokenizer,
    end_tokens,
    plain_tokens,
    start_tokens,
    text_tokens,
)
from supra.data.text import Documents
from supra.errors import UserError
from supra.losses.chunked import chunks, logits_of
from supra.losses.token_losses import next_token_nats
from supra.model.cache import cache_name
from supra.model.native.adapter import empty_cache
from supra.model.offload import device_of

CHARACTERS = 2**16  # tokenised at a time; a book's offsets and masks would take 100 times its size
FINE = 256  # maximum number of equal buckets


class TokenStream:
    """An endless stream of the tokens of documents. Each has start tokens, the text and end tokens.

    `restarts` counts how often the text began again. Blank documents are left out. Raises UserError
    when there is no text at all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: Documents):
        check_tokenizer(tokenizer)
        self.restarts = 0
        self.start, self._end = start_tokens(tokenizer), end_tokens(tokenizer)
        self._tokenizer, self._documents = tokenizer, documents
        self._tokens = self._endless()

    def take(self, count: int) -> Tensor:
        """The next tokens and labels, int64 [2, count]. The label of a start token is IGNORE."""
        return torch.tensor(list(islice(self._tokens, count))).view(-1, 2).T

    def _endless(self) -> Iterator[tuple[int, int]]:
        while True:
            empty = True
            for text in self._documents.epoch(0):
                if text and not text.isspace():
                    empty = False
                    yield from ((token, IGNORE) for token in self.start)
                    for number, part in enumerate(pieces(text)):
                        encode = plain_tokens if number else text_tokens
                        yield from ((token, token) for token in encode(self._tokenizer, part))
                    yield from ((token, token) for token in self._end)
            if empty:
                raise UserError("the text is empty: give one with words in it")
            self.restarts += 1


def begun(text: Tensor, start: Sequence[int]) -> Tensor:
    """Tokens and labels [2, n] to read from an empty state. Start tokens replace the first tokens,
    so that all other tokens keep their positions."""
    text, ids = text.clone(), torch.tensor(start[: text.shape[1]], dtype=text.dtype)
    text[0, : len(ids)], text[1, : len(ids)] = ids, IGNORE
    return text


def pieces(text: str, size: int = CHARACTERS) -> Iterator[str]:
    """A text in pieces of at most `size` characters, cut before a space if there is one."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind(" ", start + 1, start + size + 1)
        cut = start + size if cut < 0 else cut
        yield text[start:cut]
        start = cut
    yield text[start:]


class Reader:
    """Reads one text piece by piece with a model, and gives the loss of each token."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.length = model, 0
        self.cache = empty_cache(model)
        self._last: Tensor | None = None  # hidden state of the previous token

    @torch.no_grad()
    def advance(self, ids: Tensor) -> Tensor:
        """Read tokens [n]; returns their last hidden states [n, D]."""
        base = getattr(self.model, self.model.base_model_prefix)
        ids = ids.to(device_of(self.model))[None]
        end = self.length + ids.shape[1]
        inputs = {"position_ids": torch.arange(self.length, end, device=ids.device)[None]}
        inputs[cache_name(base)] = self.cache
        output = base(input_ids=ids, use_cache=True, **inputs)
        self.length = end
        hidden = output.last_hidden_state[0]
        self._last = hidden[-1:].clone()
        return hidden

    @torch.no_grad()
    def read(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read tokens [n]; returns the positions of the scored tokens and their nats, float32.

        A position is the number of tokens before it in the text. Both results may be shorter than
        n: the first token of the text is not predicted, and IGNORE labels are not scored.
        """
        last, positions = self._last, torch.arange(self.length, self.length + len(ids))
        hidden = self.advance(ids)[:-1]
        hidden = hidden if last is None else torch.cat([last, hidden])
        first = len(ids) - len(hidden)
        labels = (ids if labels is None else labels)[first:]
        scored, labels = labels != IGNORE, labels.to(hidden.device)
        nats = [
            next_token_nats(logits_of(self.model, hidden[rows]), labels[rows]).cpu()
            for rows in chunks(self.model, hidden)
        ]
        return positions[first:][scored], torch.cat([torch.empty(0), *nats])[scored]


@dataclass(frozen=True)
class Bucket:
    """The tokens at positions `start` to `end` - 1, and their mean nats."""

    start: int
    end: int
    tokens: int
    loss: float


class Buckets:
    """Sums of nats between ascending edges. Positions outside the edges are not counted."""

    def __init__(self, edges: Sequence[int]):
        self.edges = torch.tensor(edges)
        self.sums, self.counts = torch.zeros(2, len(edges) - 1, dtype=torch.float64)

    def add(self, positions: Tensor, nats: Tensor) -> None:
        at = torch.bucketize(positions, self.edges, right=True) - 1
        inside = (at >= 0) & (at < len(self.sums))
        self.sums.index_add_(0, at[inside], nats[inside].double())
        self.counts += torch.bincount(at[inside], minlength=len(self.counts))

    def found(self) -> list[Bucket]:
        """The buckets that contain tokens."""
        edges, sums, counts = (x.tolist() for x in (self.edges, self.sums, self.counts))
        rows = zip(pairwise(edges), counts, sums, strict=True)
        return [Bucket(*ends, int(count), total / count) for ends, count, total in rows if count]


def fine_edges(tokens: int) -> list[int]:
    """The edges of at most FINE equal buckets; the last one may reach beyond the end."""
    width = -(-tokens // FINE)
    return list(range(0, tokens + width, width))


def mean_loss(buckets: Sequence[Bucket], start: int = 0, end: float = float("inf")) -> float:
    """Mean nats per token over the buckets between `start` and `end`."""
    inside = [x for x in buckets if start <= x.start and x.end <= end]
    return sum(x.loss * x.tokens for x in inside) / sum(x.tokens for x in inside)


def cuts(length: int, chunk: int, marks: Iterable[int] = ()) -> Iterator[tuple[int, int]]:
    """(start, end) of the pieces of a text of `length` tokens. No piece is longer than `chunk`, and
    a piece ends at every mark."""
    start = 0
    for mark in sorted({*(x for x in marks if 0 < x < length), length}):
        while start < mark:
            end = min(mark, (start // chunk + 1) * chunk)
            yield start, end
            start = end
