"""Packs documents, end to end, into blocks of exactly sequence_length tokens.

A document begins where position_ids restart at 0. transformers' models and supra's recognise packed
rows by this when there is neither an attention mask nor a cache.

A document gets the special tokens that its tokenizer adds to a text, and ends with end-of-sequence.
Most tokenizers add nothing. If one adds start tokens such as `<bos>`, the model has hardly ever
seen a text without them, so every piece that is read from an empty state begins with them. This
includes a piece that continues a document in the next row. Start tokens are not predicted. The
first token of a document is predicted from them, as in pretraining. The first token of a continued
piece is not predicted: its context was cut off, and a model trained on it would learn that
documents begin in the middle of a sentence.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from supra.errors import UserError

IGNORE = -100  # the label that losses skip, as in PyTorch and transformers

Block = dict[str, torch.Tensor]
"""input_ids, position_ids, labels: [T] int64 each.

A label has the position of its own token, as transformers expects: position t is trained on
labels[t + 1]. Start tokens have the label -100. The first token of a piece also has it, unless it
begins a document and follows start tokens.
"""

# texts that most tokenizers have tokens for; if none works, this many of the tokenizer's own tokens
# are tried
PROBES, OWN_PROBES = ("a", "A", "1", "."), 100


def plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def continuation_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> list[int]:
    """The tokens of `text` as they follow `prompt`. Tokenized alone, `text` may get an extra
    space."""
    return plain_tokens(tokenizer, prompt + text)[len(plain_tokens(tokenizer, prompt)) :]


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text.

    They are found by trying, because `bos_token` and `add_bos_token` are often wrong. Raises
    UserError if they cannot be found.
    """
    for probe in _probes(tokenizer):
        plain, whole = plain_tokens(tokenizer, probe), tokenizer(probe)["input_ids"]
        for start in range(len(whole) - len(plain) + 1) if plain else ():
            end = start + len(plain)
            if whole[start:end] == plain:
                return whole[:start], whole[end:]
    raise UserError(
        "the tokenizer changes a text's tokens when it adds special tokens, so the special tokens "
        f"cannot be told apart (tried with {', '.join(map(repr, PROBES))}): use a tokenizer that "
        "only adds tokens"
    )


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield from PROBES
    special = set(tokenizer.all_special_ids)
    ids = (id for id in range(len(tokenizer)) if id not in special)
    yield from (tokenizer.decode([id]) for id in islice(ids, OWN_PROBES))


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text; [] for most."""
    return added_tokens(tokenizer)[0]


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text without start and end tokens. Start tokens that are spelled out in the
    text, as a chat template does, are dropped too."""
    tokens, start = plain_tokens(tokenizer, text), start_tokens(tokenizer)
    return tokens[len(start) :] if tokens[: len(start)] == start else tokens


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The document's tokens with its end tokens, without start tokens; [] for blank text."""
    if not text or text.isspace():
        return []
    return [*text_tokens(tokenizer, text), *end_tokens(tokenizer)]


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end of a document: the tokenizer's own end tokens, with end-of-sequence as the last."""
    end = added_tokens(tokenizer)[1]
    return end if end[-1:] == [tokenizer.eos_token_id] else [*end, tokenizer.eos_token_id]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos_token, but each document must end with one: set eos_token in "
            "tokenizer_config.json"
        )


class Document(NamedTuple):
    """A document as models read it.

    tokens: without start tokens.
    labels: the tokens again, with -100 for those that are not trained on.
    start: the start tokens that stand before every piece of the document.
    """

    tokens: Sequence[int]
    labels: Sequence[int]
    start: Sequence[int]

    def beginning(self, count: int) -> "Document":
        """The document without the tokens behind the first `count`."""
        return Document(self.tokens[:count], self.labels[:count], self.start)


NOTHING = Document((), (), ())


def text_document(tokenizer: PreTrainedTokenizerBase, text: str) -> Document:
    """A text that is trained on as a whole; blank text has no tokens."""
    tokens = encode(tokenizer, text)
    return Document(tokens, tokens, start_tokens(tokenizer)) if tokens else NOTHING


def block(pieces: Iterable[Sequence[int]], labels: Iterable[Sequence[int]] | None = None) -> Block:
    """One block from pieces of documents with their labels. Without labels, all tokens of a piece
    but the first are predicted."""
    pieces = list(pieces)
    labels = map(unpredicted, pieces) if labels is None else labels
    ids, positions = [], []
    for piece in pieces:
        ids += piece
        positions += range(len(piece))
    columns = {"input_ids": ids, "position_ids": positions, "labels": [*chain(*labels)]}
    return {name: torch.tensor(column) for name, column in columns.items()}


def unpredicted(labels: Sequence[int]) -> list[int]:
    """The labels of a piece whose first token is not predicted."""
    return [IGNORE, *labels[1:]][: len(labels)]


class Row:
    """Collects pieces of documents, each behind its start tokens, into a block of `length`
    tokens."""

    def __init__(self, length: int):
        self.room = length
        self.pieces, self.labels = [], []

    def add(self, document: Document, offset: int) -> int:
        """Add as many of a document's tokens as fit, from `offset` on, and return their number.

        It is 0 if the start tokens fill the rest of the row.
        """
        start = document.start[: self.room]
        taken = slice(offset, offset + self.room - len(start))
        tokens, labels = document.tokens[taken], document.labels[taken]
        if not (start and offset == 0):
            labels = unpredicted(labels)
        self.pieces.append([*start, *tokens])
        self.labels.append([*[IGNORE] * len(start), *labels])
        self.room -= len(self.pieces[-1])
        return len(tokens)

    def block(self) -> Block:
        return block(self.pieces, self.labels)


def check_room(sequence_length: int, start: Sequence[int]) -> None:
    """Raise UserError for rows that have no room for text behind the start tokens."""
    if sequence_length <= len(start):
        raise UserError(
            f"sequence_length (={sequence_length}) leaves no room for text: the tokenizer puts "
            f"{len(start)} tokens before each text, so it must be at least {len(start) + 1}"
        )


def pack(documents: Iterable[Document], sequence_length: int) -> Iterator[Block]:
    """Pack documents into blocks. An incomplete last block is dropped."""
    row = Row(sequence_length)
    for document in documents:
        offset = 0
        while offset < len(document.tokens):
            offset += row.add(document, offset)
            if row.room == 0:
                yield row.block()
                row = Row(sequence_length)


def collate(blocks: Iterable[Block]) -> Block:
    """Stack blocks into a batch: [B, T] each."""
    blocks = list(blocks)
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """[B, T]: at t the label that the logits at t are scored on, labels[:, t + 1]; -100 at the
    end."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
