"""Text as blocks of tokens, the same blocks for every model that is evaluated on it."""

from collections.abc import Iterable, Iterator
from itertools import islice

from transformers import PreTrainedTokenizerBase

from supra.data.packing import Block, check_tokenizer, encode, pack, start_tokens
from supra.errors import UserError


def blocks_from_text(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    sequence_length: int,
    tokens: int | None = None,
) -> list[Block]:
    """Packed blocks of `documents`. Blank documents are skipped; an incomplete last block is
    dropped.

    tokens: the maximum number of tokens, but always at least one block. Documents after that are
        not read.
    Raises UserError when the text does not fill one block.
    """
    check_tokenizer(tokenizer)
    lengths = []

    def encoded() -> Iterator[list[int]]:
        for text in documents:
            ids = encode(tokenizer, text)
            lengths.append(len(ids))
            yield ids

    count = None if tokens is None else max(1, tokens // sequence_length)
    blocks = list(islice(pack(encoded(), sequence_length, start_tokens(tokenizer)), count))
    if not blocks:
        raise UserError(
            f"sequence_length (={sequence_length}) is longer than the evaluation text "
            f"({sum(lengths)} tokens): lower it, or give a longer text"
        )
    return blocks
