"""Documents, end to end, in blocks of exactly sequence_length tokens.

Document boundaries are where position_ids restart at 0, which is how transformers' models (and
ours) recognise packed rows when there is neither an attention mask nor a cache.
"""

from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedTokenizerBase

from supra.errors import UserError

IGNORE = -100  # a label that no loss counts, as everywhere in PyTorch and transformers

Block = dict[str, torch.Tensor]
"""input_ids, position_ids, labels: [T] int64 each.

Labels stand where their token stands, as transformers expects: position t is trained on
labels[t + 1]. The first token of a document or of a block has the label -100.
"""


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The document's tokens without special ones, then end-of-sequence; [] for blank text."""
    if not text or text.isspace():
        return []
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*tokens, tokenizer.eos_token_id]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token, which must end each document: set one")


def block(pieces: Iterable[list[int]]) -> Block:
    """One block from pieces of documents; no token predicts the first token of the next piece."""
    ids, positions, labels = [], [], []
    for piece in pieces:
        ids += piece
        positions += range(len(piece))
        labels += [IGNORE, *piece[1:]]
    columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor(column) for name, column in columns.items()}


def pack(documents: Iterable[list[int]], sequence_length: int) -> Iterator[Block]:
    """Cut the documents' tokens into blocks; what is left at the end is dropped."""
    pieces, room = [], sequence_length
    for tokens in documents:
        start = 0
        while start < len(tokens):
            pieces.append(tokens[start : start + room])
            start += len(pieces[-1])
            room -= len(pieces[-1])
            if room == 0:
                yield block(pieces)
                pieces, room = [], sequence_length


def collate(blocks: Iterable[Block]) -> Block:
    """Stack blocks into a batch: [B, T] each."""
    blocks = list(blocks)
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """labels[:, t + 1] at t, -100 at the end: what the logits at t are scored on. [B, T]."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
