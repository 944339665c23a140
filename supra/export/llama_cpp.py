"""GGUF files in llama.cpp: logits, tokens and quantised rows.

The package xllamacpp is llama.cpp as one library. What it wraps in Python gives text but no logits,
so this file calls llama.cpp's own C functions in that library.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from functools import cache
from importlib.metadata import version as package_version
from pathlib import Path

import torch
from torch import Tensor

from supra.errors import UserError

PACKAGE = "xllamacpp"
INSTALL = f"pip install '{PACKAGE}>=2026.10'"
BATCH = 512  # tokens of one call, for which llama.cpp keeps all logits


class _Batch(Structure):
    _fields_ = (
        ("tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embedding", POINTER(c_float)),
        ("position", POINTER(c_int32)),
        ("sequences", POINTER(c_int32)),
        ("sequence", POINTER(POINTER(c_int32))),
        ("wants_logits", POINTER(c_int8)),
    )


class _ModelSettings(Structure):
    """Passed on as it is. The library writes and reads fewer bytes than this."""

    _fields_ = (("bytes", ctypes.c_char * 256),)


class _ContextSettings(Structure):
    """The beginning of llama_context_params. What follows is passed on as it is."""

    _fields_ = (
        ("context", c_uint32),
        ("batch", c_uint32),
        ("micro_batch", c_uint32),
        ("max_sequences", c_uint32),
        ("snapshots", c_uint32),
        ("max_outputs", c_uint32),
        ("max_outputs_per_sequence", c_uint32),
        ("threads", c_int32),
        ("batch_threads", c_int32),
        ("kind", c_int),
        ("rope_scaling", c_int),
        ("pooling", c_int),
        ("attention", c_int),
        ("flash_attention", c_int),
        ("rope", c_float * 2),
        ("yarn", c_float * 4),
        ("yarn_context", c_uint32),
        ("defragment", c_float),
        ("callback", c_void_p * 2),
        ("key_type", c_int),
        ("value_type", c_int),
        ("pointers", c_void_p * 3),
        ("embeddings", c_bool),
        ("offload", c_bool * 2),
        ("operations", c_bool),
        ("whole_windows", c_bool),
        ("shared_cache", c_bool),
        ("bytes", ctypes.c_char * 256),
    )


# What a library whose settings are laid out as above writes by default.
_DEFAULTS = {"context": 512, "batch": 2048, "micro_batch": 512, "max_sequences": 1}
_DEFAULTS |= {"max_outputs": 0, "max_outputs_per_sequence": 1, "key_type": 1, "value_type": 1}
_DEFAULTS |= {"embeddings": False, "operations": True, "shared_cache": False}

_LOG = CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_ERROR = 4  # the level of errors in its log
_errors: list[str] = []  # the library's last ones


@_LOG
def _log(level: int, text: bytes, data: int | None) -> None:
    if level == _ERROR:
        _errors[:] = [*_errors[-2:], text.decode(errors="replace").strip()]


_FUNCTIONS = {
    "ggml_quantize_chunk": (c_size_t, (c_int, *[c_void_p] * 2, *[c_int64] * 3, c_void_p)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "llama_backend_init": (None, ()),
    "llama_batch_free": (None, (_Batch,)),
    "llama_batch_init": (_Batch, (c_int32, c_int32, c_int32)),
    "llama_context_default_params": (_ContextSettings, ()),
    "llama_decode": (c_int32, (c_void_p, _Batch)),
    "llama_detokenize": (c_int32, (c_void_p, c_void_p, c_int32, c_void_p, c_int32, c_bool, c_bool)),
    "llama_free": (None, (c_void_p,)),
    "llama_get_logits_ith": (c_void_p, (c_void_p, c_int32)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, _ContextSettings)),
    "llama_log_set": (None, (_LOG, c_void_p)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_memory_seq_add": (None, (c_void_p, *[c_int32] * 4)),
    "llama_memory_seq_cp": (None, (c_void_p, *[c_int32] * 4)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, *[c_int32] * 3)),
    "llama_model_default_params": (_ModelSettings, ()),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_is_hybrid": (c_bool, (c_void_p,)),
    "llama_model_is_recurrent": (c_bool, (c_void_p,)),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _ModelSettings)),
    "llama_state_seq_get_data": (c_size_t, (c_void_p, c_void_p, c_size_t, c_int32)),
    "llama_state_seq_get_size": (c_size_t, (c_void_p, c_int32)),
    "llama_state_seq_set_data": (c_size_t, (c_void_p, c_void_p, c_size_t, c_int32)),
    "llama_tokenize": (
        c_int32, (c_void_p, c_char_p, c_int32, c_void_p, c_int32, c_bool, c_bool),
    ),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
}  # fmt: skip


def is_installed() -> bool:
    """Whether the package is there; `version` says whether it is usable."""
    return importlib.util.find_spec(PACKAGE) is not None


def version() -> str:
    """The version of the package. Raises UserError if it is missing or too old."""
    _library()
    return f"{PACKAGE} {package_version(PACKAGE)}"


@cache
def _library() -> ctypes.CDLL:
    """The library with its functions declared. Raises UserError if it is missing or too old."""
    if not is_installed():
        raise UserError(f"llama.cpp is not installed: {INSTALL}")
    folder = Path(importlib.util.find_spec(PACKAGE).origin).parent
    files = [file for end in ("so", "pyd") for file in folder.glob(f"{PACKAGE}*.{end}")]
    other = UserError(
        f"{PACKAGE} {package_version(PACKAGE)} is a llama.cpp of another version than the ones "
        f"that supra knows: {INSTALL}"
    )
    if not files:
        raise other
    library = ctypes.CDLL(str(files[0]))
    for name, (returned, taken) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise other from None
        function.restype, function.argtypes = returned, taken
    defaults = library.llama_context_default_params()
    if any(getattr(defaults, name) != value for name, value in _DEFAULTS.items()):
        raise other
    library.llama_log_set(_log, None)
    library.llama_backend_init()
    return library


def quantise(rows: Tensor, kind: int) -> Tensor:
    """Rows [N, D], float32, as blocks of llama.cpp's type with the number `kind`: uint8 [N, bytes].

    The number of values in a block has to divide D.
    """
    library, rows = _library(), rows.contiguous()
    blocks = torch.empty(
        rows.shape[0], library.ggml_row_size(kind, rows.shape[1]), dtype=torch.uint8
    )
    arguments = rows.data_ptr(), blocks.data_ptr(), 0, *rows.shape, None
    library.ggml_quantize_chunk(kind, *arguments)
    return blocks


class LlamaCpp:
    """A GGUF file in llama.cpp, with the state of one text.

    context: the largest number of tokens of the text.
    exact: keys and values of attention are kept in float32, and not in float16, which is
        llama.cpp's default and differs by 1e-3.
    threads: default: as many as torch uses.

    Raises UserError if llama.cpp is not installed, or cannot load the file.
    """

    def __init__(
        self, file: Path, context: int = 4096, exact: bool = True, threads: int | None = None
    ):
        self._library, self._context, self._model = _library(), None, None
        _errors.clear()
        self._model = self._library.llama_model_load_from_file(
            str(file).encode(), self._library.llama_model_default_params()
        )
        settings = self._library.llama_context_default_params()
        settings.context, settings.batch, settings.micro_batch = context, BATCH, BATCH
        settings.max_outputs_per_sequence = 0  # as many as there are tokens
        settings.max_sequences, settings.shared_cache = 2, True  # the second is for `repeat`
        settings.threads = settings.batch_threads = threads or torch.get_num_threads()
        if exact:
            settings.key_type = settings.value_type = settings.flash_attention = 0
        if self._model is not None:
            self._context = self._library.llama_init_from_model(self._model, settings)
        if self._context is None:
            self.close()
            raise UserError(f"{version()} does not load {file}: {' '.join(_errors)}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.vocabulary_size = self._library.llama_vocab_n_tokens(self._vocabulary)
        self._batch = self._library.llama_batch_init(BATCH, 0, 1)
        self._size, self.position = context, 0  # of the largest text, and tokens read

    def close(self) -> None:
        """Free its memory."""
        if self._context is not None:
            self._library.llama_free(self._context)
            self._library.llama_batch_free(self._batch)
        if self._model is not None:
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def reset(self) -> None:
        """Begin a new text."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self.position = 0

    def read(self, tokens: Sequence[int], logits: bool = True) -> Tensor:
        """Read more tokens of the text. Returns float32 logits [T, V] after each of them, or
        [1, V] after the last with logits=False."""
        if self.position + len(tokens) > self._size:  # the library would end the process
            raise UserError(
                f"a text of {self.position + len(tokens)} tokens needs a longer context than "
                f"{self._size}"
            )
        found = [
            self._read_batch(tokens[start : start + BATCH], logits)
            for start in range(0, len(tokens), BATCH)
        ]
        return torch.cat(found) if logits else found[-1]

    def _read_batch(self, tokens: Sequence[int], logits: bool) -> Tensor:
        batch, last = self._batch, len(tokens) - 1
        batch.tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.position[place] = token, self.position + place
            batch.sequences[place], batch.sequence[place][0] = 1, 0
            batch.wants_logits[place] = logits or place == last
        if (code := self._library.llama_decode(self._context, batch)) != 0:
            raise UserError(f"{version()} stopped with code {code}: {' '.join(_errors)}")
        self.position += len(tokens)
        size = self.vocabulary_size
        rows = torch.empty(len(tokens) if logits else 1, size)
        for row, place in enumerate(range(len(tokens)) if logits else [last]):
            source = self._library.llama_get_logits_ith(self._context, place)
            ctypes.memmove(rows[row].data_ptr(), source, size * 4)
        return rows

    @property
    def state_bytes(self) -> int:
        """The size of the text's state: keys and values, and states of recurrent layers."""
        return self._library.llama_state_seq_get_size(self._context, 0)

    @property
    def only_attends(self) -> bool:
        """Whether no layer is recurrent."""
        recurrent = self._library.llama_model_is_recurrent(self._model)
        return not (recurrent or self._library.llama_model_is_hybrid(self._model))

    def repeat(self, times: int) -> None:
        """Append copies of the keys and values so far, at later positions, until there are `times`
        as many. It is for measuring: a long text that is read takes hours, and a step after it
        takes the same time whatever it says. Only for models that only attend."""
        library, memory = self._library, self._library.llama_get_memory(self._context)
        data = (ctypes.c_ubyte * self.state_bytes)()
        library.llama_state_seq_get_data(self._context, data, len(data), 0)
        length = self.position
        for _ in range(times - 1):
            library.llama_state_seq_set_data(self._context, data, len(data), 1)
            library.llama_memory_seq_add(memory, 1, -1, -1, self.position)
            library.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            library.llama_memory_seq_rm(memory, 1, -1, -1)
            self.position += length

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """Read the tokens of a new text and continue it greedily by `count` tokens."""
        self.reset()
        following = [int(self.read(tokens, logits=False).argmax())]
        while len(following) < count:
            following.append(int(self.read(following[-1:]).argmax()))
        return following

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text, with those that the file says to put around it.

        special: names of special tokens in the text become these tokens.
        """
        data = text.encode()
        tokens = (c_int32 * (len(data) + 16))()
        arguments = byref(tokens), len(tokens), True, special
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), *arguments)
        return tokens[:count]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        given = (c_int32 * len(tokens))(*tokens)
        text = ctypes.create_string_buffer(64 * len(tokens) + 64)
        arguments = byref(text), len(text), False, True
        count = self._library.llama_detokenize(
            self._vocabulary, byref(given), len(given), *arguments
        )
        return text.raw[:count].decode(errors="replace")
