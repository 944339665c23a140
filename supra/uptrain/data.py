"""Text as an endless stream of packed blocks, which can resume at any position."""

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from supra.data.ahead import ahead
from supra.data.blocks import blocks_from_text
from supra.data.chat import Content, read_document
from supra.data.packing import NOTHING, Block, Document, Row, check_room, start_tokens
from supra.data.stream import Place
from supra.data.text import Documents, open_dataset
from supra.errors import UserError
from supra.uptrain.config import UptrainConfig
from supra.uptrain.data_settings import DataConfig, SourceConfig

AHEAD = 256  # documents; more than the processes of a step read, so that a step need not wait


class BlockStream:
    """The endless blocks of one lane (see `Lanes`): its documents, packed, epoch after epoch.

    A lane has every `world`-th document, from number `rank` on.

    With `segments`, a block has that many times sequence_length tokens, all from one document. A
    long document gives several blocks. Its last tokens are dropped if they do not fill a block, and
    so are short documents. Only the first segment has start tokens.

    The position says exactly where the next token comes from: the epoch, the number of documents
    read in it, and the number of tokens of the last document that are in earlier blocks, without
    start tokens; for streamed data also a place to begin reading from. Loading a position tokenises
    that document again.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        *,
        rank: int = 0,
        world: int = 1,
        segments: int | None = None,
        setting: str = "data.sequence_length",  # in messages, like name
        min_document_tokens: int = 0,
        name: str = "the data",
        executor: Executor | None = None,  # tokenizes the next documents
    ):
        self.source, self.tokenizer, self.name = documents, tokenizer, name
        self.executor = executor
        self.start = start_tokens(tokenizer)
        self.rank, self.world = rank, world
        self.sequence_length, self.segments, self.setting = sequence_length, segments, setting
        self.min_document_tokens = min_document_tokens
        check_room(self.block_tokens, self.start)
        self.load_state_dict({"epoch": 0, "documents": 0, "offset": 0})

    def state_dict(self) -> dict[str, Any]:
        position = {"epoch": self.epoch, "documents": self.documents, "offset": self.offset}
        return position if self.at is None else position | {"stream": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position. If the text changed and has no such position, go to the next document
        or epoch; `found` is then false."""
        segments, self.segments = self.segments, None  # offsets count tokens of whole documents
        self.epoch = state["epoch"]
        self._open(max(0, state["documents"] - 1), state.get("stream"))
        if state["documents"]:
            self._next_document()
        there = self.epoch == state["epoch"] and self.documents == state["documents"]
        self.found = there and state["offset"] <= len(self.document.tokens)
        if there:
            self.offset = min(state["offset"], len(self.document.tokens))
        self.segments = segments
        self._drop_rest()

    @property
    def place(self) -> str:
        """The position in words."""
        return f"epoch {self.epoch + 1} after {self.documents} documents"

    @property
    def block_tokens(self) -> int:
        return self.sequence_length * (self.segments or 1)

    @property
    def text_tokens(self) -> int:
        """The number of text tokens in a block with a single piece."""
        return self.block_tokens - len(self.start)

    def cut(self, sequence_length: int, segments: int | None, setting: str) -> None:
        """From here on, give blocks of this size; None for `segments` gives packed blocks.

        setting: the name of the setting that says sequence_length.
        """
        self.sequence_length, self.segments, self.setting = sequence_length, segments, setting
        self._drop_rest()

    def _drop_rest(self) -> None:
        """With segments, drop the last tokens of the document, which do not fill a block."""
        if self.segments:
            size = self.block_tokens - len(self.document.start)
            count = len(self.document.tokens) // size * size
            self.document = self.document.beginning(count)
            self.offset = min(count, -(-self.offset // size) * size)

    def __iter__(self) -> Iterator[Block]:
        return self

    def __next__(self) -> Block:
        row = Row(self.block_tokens)
        while row.room:
            while self.offset == len(self.document.tokens):
                self._next_document()
            self.offset += row.add(self.document, self.offset)
        return row.block()

    def _open(self, skip: int = 0, at: Place | None = None) -> None:
        contents = self.source.read(self.epoch, self.rank, self.world, skip, at)
        self.contents = ahead(self._tokenized, contents, self.executor, AHEAD)
        self.at: Place | None = None  # of the document, in streamed data
        self.documents, self.document, self.offset = skip, NOTHING, 0
        self.tokens_read = 0 if skip == 0 else None  # in this epoch; unknown after a skip
        self.longest = 0  # tokens of the longest document in this epoch

    def _tokenized(self, found: tuple[Content, Place | None]) -> tuple[Document, Place | None]:
        content, at = found
        return read_document(self.tokenizer, content), at

    def _next_document(self) -> None:
        while (found := next(self.contents, None)) is None:
            self._check_enough()
            self.epoch += 1
            self._open()
        self.documents += 1
        self.offset, (self.document, self.at) = 0, found
        count = len(self.document.tokens)
        self.longest = max(self.longest, count)
        if count < self.min_document_tokens:
            self.document = NOTHING
        self._drop_rest()
        if self.tokens_read is not None:
            self.tokens_read += len(self.document.tokens)

    def _check_enough(self) -> None:
        if self.tokens_read is None or self.tokens_read >= self.text_tokens:
            return
        share = f" of process {self.rank + 1} of {self.world}" if self.world > 1 else ""
        if self.longest == 0:
            why = f"all {self.documents} documents are blank"
            if self.documents == 0:
                why = "there is no document, or data.eval_documents holds out all of them"
            raise UserError(f"there is no text in {self.name}{share}: {why}; give more text")
        longest = f"the longest of {self.documents} documents{share} has {self.longest}"
        if self.longest < self.min_document_tokens:
            raise UserError(
                f"data.min_document_tokens (={self.min_document_tokens}) leaves no document: "
                f"{longest} tokens; lower it or give longer documents"
            )
        if self.segments:
            raise UserError(
                f"extend.state_passing (={self.segments}) x {self.setting} "
                f"(={self.sequence_length}) is {self.block_tokens} tokens of one document, and "
                f"{longest}: lower one of them or give longer documents"
            )
        raise UserError(
            f"{self.setting} (={self.sequence_length}) is longer than {self.name}{share} "
            f"({self.tokens_read} tokens in {self.documents} documents): "
            "lower it or give more text"
        )


def training_documents(config: UptrainConfig) -> list[Documents]:
    """The documents of each training text that is read, without those that are held out."""
    data = config.data
    order = {"seed": data.shuffle_seed, "buffer": data.shuffle_buffer}
    return [
        Documents(
            _training_set(data, text),
            text.text_field or data.text_field,
            source=text.path,
            chats=True,
            recall=text.recall,
            parts=not data.eval_documents,
            **order,
        )
        for text in data.read
    ]


def _training_set(
    data: DataConfig, text: SourceConfig
) -> datasets.Dataset | datasets.IterableDataset:
    """A training text without the documents that are held out."""
    dataset = open_dataset(text.path, text.name, text.split, data.streaming)
    if not data.eval_documents:
        return dataset
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.skip(data.eval_documents)
    if len(dataset) <= data.eval_documents:
        raise UserError(
            f"data.eval_documents (={data.eval_documents}) leaves nothing to train on: "
            f"{text.path} has {len(dataset)} documents; lower it or give more text"
        )
    return dataset.select(range(data.eval_documents, len(dataset)))


def held_out_blocks(config: UptrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[Block]:
    """Blocks with about eval.tokens tokens of held-out text; [] if the config has no such text.

    The first documents of several sources have the sources' shares of the tokens. None are
    rewritten for recall, and sources of passkeys have none.
    """
    data, tokens = config.data, config.eval.tokens
    if data.eval_documents:
        total = sum(text.weight for text in data.read)
        parts = [(text, text.weight / total) for text in data.read]
    elif data.eval_path:
        parts = [(SourceConfig(path=data.eval_path), 1)]
    elif data.eval_split:
        (text,) = data.texts
        parts = [(text.model_copy(update={"split": data.eval_split}), 1)]
    else:
        return []
    blocks = []
    for text, share in parts:
        dataset = open_dataset(text.path, text.name, text.split, data.streaming)
        if data.eval_documents:
            dataset = dataset.take(data.eval_documents)
        field = text.text_field or data.text_field
        documents = Documents(dataset, field, source=text.path, chats=True).epoch(0)
        count = round(tokens * share)
        blocks += blocks_from_text(tokenizer, documents, data.sequence_length, count)
    return blocks
