"""Documents, end to end, in blocks of exactly sequence_length tokens.

Document boundaries are where position_ids restart at 0, which is how transformers' models (and
ours) recognise packed rows when there is neither an attention mask nor a cache.

A document gets what its tokenizer puts around a text, and ends with end-of-sequence. Most add
nothing. Where one adds start tokens, as `<bos>`, a model has hardly seen a text without them, so
every piece that is read from an empty state begins with them: also one that goes on with a document
in the next row, at the cost of so many tokens of that row. Nothing predicts a start token. The
first token of a document is predicted from them, as the model has learned to. The first token of a
piece that goes on is not: what it depends on was cut off, and a model that is trained on it would
learn that documents begin in the middle of a sentence.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat

import torch
from transformers import PreTrainedTokenizerBase

from supra.errors import UserError

IGNORE = -100  # a label that no loss counts, as everywhere in PyTorch and transformers

Block = dict[str, torch.Tensor]
"""input_ids, position_ids, labels: [T] int64 each.

Labels stand where their token stands, as transformers expects: position t is trained on
labels[t + 1]. Start tokens have the label -100, and so has the first token of a piece unless it is
that of a document after start tokens.
"""

# texts that most tokenizers have tokens for, and how many of its own tokens are tried where not
PROBES, OWN_PROBES = ("a", "A", "1", "."), 100


def plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before a text and after it.

    Found from what it does: `bos_token` and `add_bos_token` often say otherwise. Raises UserError
    where it cannot be told.
    """
    for probe in _probes(tokenizer):
        plain, whole = plain_tokens(tokenizer, probe), tokenizer(probe)["input_ids"]
        for start in range(len(whole) - len(plain) + 1) if plain else ():
            end = start + len(plain)
            if whole[start:end] == plain:
                return whole[:start], whole[end:]
    raise UserError(
        "the tokenizer gives other tokens where it adds special ones, so that they cannot be told "
        f"apart (tried with {', '.join(map(repr, PROBES))}): give a tokenizer that only adds them"
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
    """Without special tokens at the ends, also where the text brings its start itself, as one that
    a chat template wrote."""
    tokens, start = plain_tokens(tokenizer, text), start_tokens(tokenizer)
    return tokens[len(start) :] if tokens[: len(start)] == start else tokens


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The document's tokens without those of its start, with those of its end; [] for blank text.

    The end is what the tokenizer adds there, and end-of-sequence, which is not doubled.
    """
    if not text or text.isspace():
        return []
    return [*text_tokens(tokenizer, text), *end_tokens(tokenizer)]


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of a document: what the tokenizer adds, and end-of-sequence, once."""
    end = added_tokens(tokenizer)[1]
    return end if end[-1:] == [tokenizer.eos_token_id] else [*end, tokenizer.eos_token_id]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token, which must end each document: set one")


def block(pieces: Iterable[list[int]], unpredicted: Iterable[int] = repeat(1)) -> Block:
    """One block from pieces of documents; of each, so many first tokens have no label."""
    ids, positions, labels = [], [], []
    for piece, count in zip(pieces, unpredicted, strict=False):
        ids += piece
        positions += range(len(piece))
        labels += [*[IGNORE] * min(count, len(piece)), *piece[count:]]
    columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor(column) for name, column in columns.items()}


class Row:
    """A block of `length` tokens that takes pieces of documents, each after the start tokens."""

    def __init__(self, length: int, start: Sequence[int]):
        if length <= len(start):
            raise UserError(
                f"sequence_length (={length}) leaves no room for text: the tokenizer puts "
                f"{len(start)} tokens before each, so it must be at least {len(start) + 1}"
            )
        self.room, self.start = length, start
        self.pieces, self.unpredicted = [], []

    def add(self, tokens: list[int], offset: int) -> int:
        """Take what fits of a document from `offset` on, and return how many tokens that is.

        None where the room ends with the start tokens, or within them.
        """
        start = self.start[: self.room]
        taken = tokens[offset : offset + self.room - len(start)]
        self.pieces.append([*start, *taken])
        self.unpredicted.append(len(start) if start and offset == 0 else len(start) + 1)
        self.room -= len(self.pieces[-1])
        return len(taken)

    def block(self) -> Block:
        return block(self.pieces, self.unpredicted)


def pack(
    documents: Iterable[list[int]], sequence_length: int, start: Sequence[int] = ()
) -> Iterator[Block]:
    """Cut the documents' tokens into blocks, each piece after the start tokens; what is left at the
    end is dropped."""
    row = Row(sequence_length, start)
    for tokens in documents:
        offset = 0
        while offset < len(tokens):
            offset += row.add(tokens, offset)
            if row.room == 0:
                yield row.block()
                row = Row(sequence_length, start)


def collate(blocks: Iterable[Block]) -> Block:
    """Stack blocks into a batch: [B, T] each."""
    blocks = list(blocks)
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """labels[:, t + 1] at t, -100 at the end: what the logits at t are scored on. [B, T]."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
