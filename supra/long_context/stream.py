"""One long text through a model that carries its state, at constant memory: of a token nothing is
kept but its share in the sums of some hundred buckets."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.cache import new_cache
from supra.errors import UserError
from supra.head import chunks, logits_of
from supra.losses import next_token_nats
from supra.packing import check_tokenizer
from supra.text import Documents

CHARACTERS = 2**16  # tokenised at a time: offsets and masks of a book would be 100 times its size
FINE = 256  # equal buckets


class TokenStream:
    """The tokens of documents one after the other, end-of-text after each, without an end.

    `restarts` counts how often the text began again. Blank documents are left out. Raises UserError
    when there is no text at all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: Documents):
        check_tokenizer(tokenizer)
        self.restarts = 0
        self._tokenizer, self._documents = tokenizer, documents
        self._tokens = self._endless()

    def take(self, count: int) -> Tensor:
        """The next tokens, int64 [count]."""
        return torch.tensor(list(islice(self._tokens, count)))

    def _endless(self) -> Iterator[int]:
        while True:
            empty = True
            for text in self._documents.epoch(0):
                if text and not text.isspace():
                    empty = False
                    for part in pieces(text):
                        yield from self._encode(part)
                    yield self._tokenizer.eos_token_id
            if empty:
                raise UserError("the text is empty: give one with words in it")
            self.restarts += 1

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def pieces(text: str, size: int = CHARACTERS) -> Iterator[str]:
    """A text in pieces of at most `size` characters, cut before a space where there is one."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind(" ", start + 1, start + size + 1)
        cut = start + size if cut < 0 else cut
        yield text[start:cut]
        start = cut
    yield text[start:]


class Reader:
    """A model that reads one text piece by piece, and how surprised it is."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.length = model, 0
        self.cache = new_cache(model.config.num_hidden_layers)
        self._last: Tensor | None = None  # hidden state of the token before

    @torch.no_grad()
    def advance(self, ids: Tensor) -> Tensor:
        """Read tokens [n]; their last hidden states [n, D]."""
        base = getattr(self.model, self.model.base_model_prefix)
        ids = ids.to(self.model.device)[None]
        output = base(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.length += ids.shape[1]
        hidden = output.last_hidden_state[0]
        self._last = hidden[-1:].clone()
        return hidden

    @torch.no_grad()
    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read tokens [n]; for each, how many stand before it in the text and its nats, float32.

        [n] both; [n - 1] at the start of the text, whose first token nothing predicts.
        """
        last, positions = self._last, torch.arange(self.length, self.length + len(ids))
        hidden = self.advance(ids)[:-1]
        hidden = hidden if last is None else torch.cat([last, hidden])
        first = len(ids) - len(hidden)
        labels = ids[first:].to(hidden.device)
        nats = [
            next_token_nats(logits_of(self.model, hidden[rows]), labels[rows]).cpu()
            for rows in chunks(self.model, hidden)
        ]
        return positions[first:], torch.cat([torch.empty(0), *nats])


@dataclass(frozen=True)
class Bucket:
    """Tokens that have `start` to `end` - 1 others before them, and their mean nats."""

    start: int
    end: int
    tokens: int
    loss: float


class Buckets:
    """Sums of nats between rising edges; what lies outside of them is not counted."""

    def __init__(self, edges: Sequence[int]):
        self.edges = torch.tensor(edges)
        self.sums, self.counts = torch.zeros(2, len(edges) - 1, dtype=torch.float64)

    def add(self, positions: Tensor, nats: Tensor) -> None:
        at = torch.bucketize(positions, self.edges, right=True) - 1
        inside = (at >= 0) & (at < len(self.sums))
        self.sums.index_add_(0, at[inside], nats[inside].double())
        self.counts += torch.bincount(at[inside], minlength=len(self.counts))

    def found(self) -> list[Bucket]:
        """Those with tokens in them."""
        edges, sums, counts = (x.tolist() for x in (self.edges, self.sums, self.counts))
        rows = zip(pairwise(edges), counts, sums, strict=True)
        return [Bucket(*ends, int(count), total / count) for ends, count, total in rows if count]


def fine_edges(tokens: int) -> list[int]:
    """Of at most FINE equal buckets; the last one may reach beyond the end."""
    width = -(-tokens // FINE)
    return list(range(0, tokens + width, width))


def mean_loss(buckets: Sequence[Bucket], start: int = 0, end: float = float("inf")) -> float:
    """Nats a token over the buckets that lie between; every token weighs the same."""
    inside = [x for x in buckets if start <= x.start and x.end <= end]
    return sum(x.loss * x.tokens for x in inside) / sum(x.tokens for x in inside)


def cuts(length: int, chunk: int, marks: Iterable[int] = ()) -> Iterator[tuple[int, int]]:
    """Where to cut a text of `length` tokens so that no piece is longer than `chunk`, and one ends
    at every mark: (start, end) of each."""
    inside = (mark for mark in marks if 0 < mark < length)
    return pairwise(sorted({*range(0, length, chunk), *inside, length}))
