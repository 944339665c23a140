"""Documents out of files or data sets on the hub, in an order that a seed decides."""

import glob
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import torch
from datasets.exceptions import DatasetsError

from supra.errors import UserError

BUILDERS = {".jsonl": "json", ".jsonl.gz": "json", ".txt": "text", ".parquet": "parquet"}
# what the readers raise for files that are empty, cut short, or not what their names say
UNREADABLE = (OSError, EOFError, ValueError, StopIteration, zlib.error, DatasetsError)


@dataclass(frozen=True)
class Documents:
    """A data set's texts, in an order that (seed, epoch) decides; read again in every epoch."""

    dataset: datasets.Dataset | datasets.IterableDataset
    text_field: str
    seed: int | None = None  # None: the data set's own order
    buffer: int = 10_000  # documents of the shuffle buffer of streamed data

    def epoch(self, epoch: int, rank: int = 0, world: int = 1, skip: int = 0) -> Iterator[str]:
        """Every `world`-th text from `rank` on, without the first `skip` of those.

        Streamed data is read and thrown away up to there: its order is only known by reading it.
        """
        if isinstance(self.dataset, datasets.IterableDataset):
            rows = self.dataset
            if self.seed is not None:
                rows = rows.shuffle(seed=self.seed + epoch, buffer_size=self.buffer)
            with _reading("the data cannot be read"):
                yield from map(self._text, islice(rows, rank + skip * world, None, world))
        else:
            order = torch.arange(len(self.dataset))
            if self.seed is not None:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order = torch.randperm(len(self.dataset), generator=generator)
            for index in order[rank::world][skip:].tolist():
                yield self._text(self.dataset[index])

    def _text(self, row: dict) -> str:
        if self.text_field not in row:
            raise UserError(
                f"text field {self.text_field!r} is not in the data: "
                f"its fields are {', '.join(row)}"
            )
        text = row[self.text_field]
        if text is not None and not isinstance(text, str):
            raise UserError(f"text field {self.text_field!r} holds {type(text).__name__}, not text")
        return text or ""


def open_dataset(
    path: str, name: str | None = None, split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Local files (one .txt file is one document), or else a data set on the hub."""
    files = local_files(path)
    if files:
        if split != "train":
            raise UserError(
                f"split {split!r} is a part of a data set on the hub, and {path} is local: "
                "give that part as files of its own"
            )
        if name is not None:
            raise UserError(
                f"name {name!r} is a configuration of a data set on the hub, and {path} is local: "
                "leave it out"
            )
        builder = BUILDERS[_suffix(files[0])]
        options = {"sample_by": "document"} if builder == "text" else {}
        source = {"path": builder, "data_files": files, "split": split, **options}
    else:
        source = {"path": path, "name": name, "split": split}
    trouble = "cannot be read" if files else "is no local file and no data set on the hub"
    with _reading(f"{path} {trouble}"):
        return datasets.load_dataset(**source, streaming=streaming)


def hub_name(path: str) -> str | None:
    """The data set on the hub that a name stands for; None for local files."""
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
        what = f"no such file: {path}"
    looks_local = Path(path).is_dir() or _suffix(path) or path.startswith((".", "/", "~"))
    if not files and (looks_local or glob.has_magic(path)):
        raise UserError(f"{what} (text is a file, a folder, a glob or a hub name)")
    kinds = {_suffix(file) for file in files}
    if None in kinds:
        raise UserError(f"{path} is not one of {', '.join(BUILDERS)}")
    if len({BUILDERS[kind] for kind in kinds}) > 1:
        raise UserError(f"{path} mixes {', '.join(sorted(kinds))}: choose one kind with a glob")
    return sorted(files)


@contextmanager
def _reading(trouble: str) -> Iterator[None]:
    """Turn what the readers raise into a UserError that begins with `trouble`."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        cause = error.__cause__ or error
        reason = "it is empty" if isinstance(cause, StopIteration) else cause
        raise UserError(f"{trouble}: {reason}") from error


def _suffix(path: str) -> str | None:
    return next((suffix for suffix in BUILDERS if path.endswith(suffix)), None)
