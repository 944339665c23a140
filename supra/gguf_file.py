"""A GGUF file, parsed once for all that is read out of it."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from supra.errors import UserError


class GgufFile:
    """What was read out of a file so far.

    transformers makes a `gguf.GGUFReader` of it for the config, for the tokenizer and for the
    weights, which takes as long as the vocabulary is large: 13 s and 700 MB for the 262,144 words
    of Gemma 3, whose weights are unpacked in 3 s.
    """

    def __init__(self, path: Path):
        self._path = path
        self._reader: Any = None
        self._kept: dict[Callable, Any] = {}

    def kept(self, key: Callable, read: Callable[[], Any]) -> Any:
        """A copy of what `read` returned when this key was first asked for."""
        if key not in self._kept:
            self._kept[key] = read()
        return copy.deepcopy(self._kept[key])

    @contextmanager
    def parsed(self) -> Iterator[None]:
        """In here, whoever makes a `gguf.GGUFReader` of this file gets the one that is there."""
        try:
            import gguf
        except ImportError:
            raise UserError(
                "reading a GGUF file needs the package gguf: pip install gguf"
            ) from None
        make = gguf.GGUFReader

        def reader(path: str, *args: Any, **kwargs: Any) -> Any:
            if not os.path.samefile(path, self._path):
                return make(path, *args, **kwargs)
            if self._reader is None:
                self._reader = make(path, *args, **kwargs)
            return self._reader

        gguf.GGUFReader = reader
        try:
            yield
        finally:
            gguf.GGUFReader = make

    def forget(self) -> None:
        """Free the parsed file; what is kept stays."""
        self._reader = None
