"""Text as blocks of tokens, the same blocks for every model that is evaluated on it."""

from collections.abc import Iterable, Iterator
from itertools import islice

from transformers import PreTrainedTokenizerBase

from supra.data.chat import Content, read_document
from supra.data.packing import Block, Document, check_room, check_tokenizer, pack, start_tokens
from supra.errors import UserError


def blocks_from_text(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Content],
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
    check_room(sequence_length, start_tokens(tokenizer))
    lengths = []

    def read() -> Iterator[Document]:
        for content in documents:
            found = read_document(tokenizer, content)
            lengths.append(len(found.tokens))
            yield found

    count = None if tokens is None else max(1, tokens // sequence_length)
    blocks = list(islice(pack(read(), sequence_length), count))
    if not blocks:
        raise UserError(
            f"sequence_length (={sequence_length}) is longer than the evaluation text "
            f"({sum(lengths)} tokens): lower it, or give a longer text"
        )
    return blocks
