"""A GGUF file, parsed once for its config, its tokenizer and its weights."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from supra.errors import UserError


class GgufFile:
    """Caches what was read from a file.

    transformers makes a new `gguf.GGUFReader` for the config, for the tokenizer and for the
    weights. Its cost grows with the vocabulary: the 262,144 tokens of Gemma 3 take 13 s and 700 MB
    each time, while unpacking the weights takes 3 s.
    """

    def __init__(self, path: Path):
        self._path = path
        self._reader: Any = None
        self._kept: dict[Callable, Any] = {}

    def kept(self, key: Callable, read: Callable[[], Any]) -> Any:
        """A copy of the value that `read` returned at the first call with this key."""
        if key not in self._kept:
            self._kept[key] = read()
        return copy.deepcopy(self._kept[key])

    @contextmanager
    def parsed(self) -> Iterator[None]:
        """Inside, `gguf.GGUFReader` returns the same reader each time it opens this file."""
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
        """Free the parsed file; the copies in `kept` stay."""
        self._reader = None
