"""Documents from files or from data sets on the hub, in an order that the seed determines."""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import datasets
import pyarrow
import pyarrow.json
import pyarrow.parquet
import torch
from datasets.exceptions import DatasetsError

from supra.data.chat import Content, is_chat
from supra.data.recall import recall_text
from supra.data.stream import Place, StreamedRows
from supra.errors import UserError

MESSAGES = "messages"  # the field of chats where there is no field of the text
BUILDERS = {".jsonl": "json", ".jsonl.gz": "json", ".txt": "text", ".parquet": "parquet"}
TEXT_TYPES = ("string", "large_string", "null")  # column types; in a null column no row has a text
# the readers' errors for files that are empty, truncated or in another format
UNREADABLE = (OSError, EOFError, ValueError, StopIteration, zlib.error, DatasetsError)


@dataclass(frozen=True)
class Documents:
    """The texts of a data set, in an order that (seed, epoch) determines.

    Every epoch reads the whole data set again; `StreamedRows` says how streamed data is read. With
    `chats`, a record may also hold a chat, a list of messages: in the field of the text, or in the
    field messages of records that have none. With `recall`, texts are rewritten so that they ask
    for recall, see supra.data.recall.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    text_field: str
    seed: int | None = None  # None: the data set's own order
    buffer: int = 10_000  # documents of streamed data that are shuffled at a time
    source: str | None = None  # where the data set was opened from, for messages
    chats: bool = False
    recall: bool = False
    parts: bool = True  # of streamed data may be read separately: no documents were left out

    def __post_init__(self):
        known = self.dataset.features or {}
        feature = known.get(self._field(known))
        if feature is None or getattr(feature, "dtype", None) in TEXT_TYPES:
            return
        if not (self.chats and _holds_chats(feature)):
            self._refuse(self._field(known), str(feature))

    def epoch(self, epoch: int, rank: int = 0, world: int = 1, skip: int = 0) -> Iterator[Content]:
        """The texts of one of `world` readers, without the first `skip` of them."""
        yield from (content for content, _ in self.read(epoch, rank, world, skip))

    def read(
        self, epoch: int, rank: int = 0, world: int = 1, skip: int = 0, place: Place | None = None
    ) -> Iterator[tuple[Content, Place | None]]:
        """The same, each with a place. If one of the last texts before had `place`, what streamed
        data has before that place is not read again."""
        if isinstance(self.dataset, datasets.IterableDataset):
            stream = StreamedRows(
                self.dataset,
                seed=self.seed,
                epoch=epoch,
                window=self.buffer,
                rank=rank,
                world=world,
                parts=self.parts,
            )
            rows = islice(stream.read(place), skip - (place["taken"] if place else 0), None)
        else:
            order = torch.arange(len(self.dataset))
            if self.seed is not None:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order = torch.randperm(len(self.dataset), generator=generator)
            rows = ((self.dataset[x], None) for x in order[rank::world][skip:].tolist())
        with _reading(f"{self.source or 'the data'} cannot be read", self._files()):
            for row, at in rows:
                content = self._content(row)
                yield self._rewritten(epoch, content) if self.recall else content, at

    def _rewritten(self, epoch: int, content: Content) -> str:
        if not isinstance(content, str):
            raise UserError(
                f"{self.source} has a chat, and recall rewrites texts alone: leave recall out"
            )
        return recall_text(content, epoch)

    def _files(self) -> list[str]:
        return [] if self.source is None else local_files(self.source)

    def _field(self, known: Collection[str]) -> str:
        """The field that holds the text or the chat, of those that are known."""
        chat = self.chats and self.text_field not in known and MESSAGES in known
        return MESSAGES if chat else self.text_field

    def _content(self, row: dict) -> Content:
        field = self._field(row)
        if field not in row:
            raise UserError(
                f"text field {field!r} is not in the data: its fields are {', '.join(row)}"
            )
        content = row[field]
        if content is None or content == []:
            return ""
        if not isinstance(content, str) and not (self.chats and is_chat(content)):
            self._refuse(field, type(content).__name__)
        return content

    def _refuse(self, field: str, kind: str) -> None:
        """Raise UserError for a text field of another type, with file and line if they are
        known."""
        found = (_fault(file, field, self.chats) for file in self._files())
        raise UserError(next(filter(None, found), _no_text(field, kind, self.chats)))


def _holds_chats(feature: Any) -> bool:
    """Whether a column may have lists of messages, also of messages with different keys."""
    message = getattr(feature, "feature", None)
    if isinstance(message, dict):
        return "role" in message
    return message is not None and not isinstance(message, datasets.Value)


def open_documents(path: str, text_field: str) -> Documents:
    """The texts of local files or of a data set on the hub, in their original order."""
    return Documents(open_dataset(path), text_field, source=path)


def open_dataset(
    path: str, name: str | None = None, split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Open local files, or a data set on the hub. One .txt file is one document.

    Raises UserError with file and line for broken text: at once, or, for streamed text, when the
    line is reached.
    """
    files = local_files(path)
    if files:
        if split != "train":
            raise UserError(
                f"split (={split!r}) is only for data sets on the hub, and {path} is local: give "
                "the files of that split"
            )
        if name is not None:
            raise UserError(
                f"name (={name!r}) is only for data sets on the hub, and {path} is local: leave it "
                "out"
            )
        builder = BUILDERS[_suffix(files[0])]
        options = {"sample_by": "document"} if builder == "text" else {}
        source = {"path": builder, "data_files": files, "split": split, **options}
    else:
        source = {"path": path, "name": name, "split": split}
    trouble = "cannot be read" if files else "is neither a local file nor a data set on the hub"
    with _reading(f"{path} {trouble}", files):
        for file in files:
            _check_lines(file, count=1 if streaming else None)
        if streaming:
            pyarrow.json.read_json = _read_rows  # datasets offers no other way to replace it
        dataset = datasets.load_dataset(**source, streaming=streaming)
        if files and not streaming:
            for batch in dataset.data.to_batches():
                batch.validate(full=True)  # parquet may hold text that is not UTF-8
        return dataset


def hub_name(path: str) -> str | None:
    """The hub name of a data set; None for local files."""
    return None if local_files(path) else path


def local_files(path: str) -> list[str]:
    """The files that a name, folder or glob stands for, sorted; [] if it must be a hub name."""
    path = os.path.expanduser(path)
    if Path(path).is_dir():
        found = [str(file) for file in Path(path).rglob("*") if file.is_file()]
        files = [file for file in found if _suffix(file)]
        what = f"folder {path} has no {', '.join(BUILDERS)} file"
    else:
        files = glob.glob(path, recursive=True)
        what = f"there is no such file: {path}"
    looks_local = Path(path).is_dir() or _suffix(path) or path.startswith((".", "/", "~"))
    if not files and (looks_local or glob.has_magic(path)):
        raise UserError(f"{what} (text is a file, a folder, a glob or a hub name)")
    kinds = {_suffix(file) for file in files}
    if None in kinds:
        raise UserError(f"{path} has another file type than {', '.join(BUILDERS)}: convert it")
    if len({BUILDERS[kind] for kind in kinds}) > 1:
        raise UserError(f"{path} mixes {', '.join(sorted(kinds))}: choose one kind with a glob")
    return sorted(files)


@contextmanager
def _reading(trouble: str, files: Iterable[str]) -> Iterator[None]:
    """Turn the readers' errors into a UserError that begins with `trouble` and names the file and
    line if they are known."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        cause = error.__cause__ or error
        reason = "it is empty" if isinstance(cause, StopIteration) else cause
        found = next(filter(None, map(_fault, files)), None)
        raise UserError(f"{trouble}: {found or ' '.join(str(reason).split())}") from error


def _check_lines(file: str, count: int | None) -> None:
    """Raise ValueError for lines that Arrow mishandles, among the first `count` (None: all).

    Arrow accepts invalid UTF-8, and crashes on JSON null at the start of one of its blocks.
    """
    kind = BUILDERS[_suffix(file)]
    if kind == "parquet":
        return
    with _opened(file) as lines:
        for line in islice(lines, count):
            line.decode()
            if kind == "json" and line.strip() == b"null":
                raise ValueError("null is not a JSON object")


_read_json = pyarrow.json.read_json


def _read_rows(source: Any, **options: Any) -> pyarrow.Table:
    """pyarrow.json.read_json, but with a ValueError instead of a crash if the first line is null.

    Streamed text reaches it in blocks from memory, and any block may begin with null.
    """
    if isinstance(source, io.BytesIO) and source.getvalue()[:64].split()[:1] == [b"null"]:
        raise ValueError("null is not a JSON object")
    return _read_json(source, **options)


def _fault(file: str, text_field: str | None = None, chats: bool = False) -> str | None:
    """The first fault of a local file, with its position; None if none is found."""
    kind, number = BUILDERS[_suffix(file)], 0
    try:
        if kind == "parquet":
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                batch.validate(full=True)
            return None
        with _opened(file) as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if kind == "json" and number == 1 and text.startswith("["):
                    json.loads(text + lines.read().decode())  # one list of all rows
                elif kind == "json" and text.strip():
                    _check_row(text.strip(), text_field, chats)
        return None if number else f"{file}: it is empty"
    except json.JSONDecodeError as error:
        place, reason = number + error.lineno - 1, f"JSON parse error: {error.msg}"
        return f"{file}, line {place}, column {error.colno}: {reason}"
    except (*UNREADABLE, RecursionError) as error:
        where = f", line {number}" if isinstance(error, ValueError) and number else ""
        where = f", after line {number}" if isinstance(error, EOFError | zlib.error) else where
        return f"{file}{where}: {error}"


def _check_row(line: str, text_field: str | None, chats: bool) -> None:
    """Raise ValueError for a line that is not a JSON object, or whose text is not a string, or with
    `chats` a chat."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"{shortened(line)} is not a JSON object")
    json.dumps(row, ensure_ascii=False).encode()  # raises for an escape that is half a character
    text = row.get(text_field)
    if text is not None and not isinstance(text, str) and not (chats and is_chat(text)):
        raise ValueError(_no_text(text_field, type(text).__name__, chats))


def _no_text(field: str, kind: str, chats: bool) -> str:
    wanted = "neither text nor messages with roles" if chats else "not text"
    return f"text field {field!r} holds {kind}, {wanted}"


def _opened(file: str):
    """Open a file of lines, as bytes."""
    return gzip.open(file) if file.endswith(".gz") else open(file, "rb")


def _suffix(path: str) -> str | None:
    return next((suffix for suffix in BUILDERS if path.endswith(suffix)), None)
