"""Rewrite a converted model, with the same logits, as a GGUF file.

    supra export ./rnn --to gguf --type q8_0 --out ./rnn.gguf

Tensors are rewritten one at a time. Before the file appears, the float32 logits that llama.cpp
computes from it are compared with those of the converted model.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from supra.checkpoint.files import check_new, check_space, staged_file
from supra.checkpoint.opening import Checkpoint, find_checkpoint
from supra.errors import UserError
from supra.export import llama_cpp
from supra.export.comparison import (
    PROMPT,
    STEPS,
    Difference,
    check_difference,
    difference,
    sample,
)
from supra.export.gguf.model import GgufModel
from supra.export.gguf.target import gguf_model, needs_attention
from supra.export.gguf.types import F32, made_by_llama_cpp, stored_bytes, tensor_types
from supra.export.gguf.vocabulary import vocabulary
from supra.export.gguf.writer import write_gguf
from supra.export.lent_weights import logits_of
from supra.export.llama_cpp import LlamaCpp
from supra.export.native import NativeModel
from supra.export.targets import check_exportable, check_idle_attention


@dataclass(frozen=True)
class GgufExport:
    """What an export wrote, and how far its logits are from the converted model's.

    `engine` computed them, None if nothing could. `difference` is that of a float32 file, and
    `rounded` that of this file, if its type is another one.
    """

    architecture: str
    tensors: int
    bytes: int
    type: str
    engine: str | None
    difference: Difference | None
    rounded: Difference | None

    def lines(self) -> list[str]:
        """The export for a terminal."""
        size = f"{self.tensors} tensors, {self.bytes / 1e6:,.1f} MB, type {self.type}"
        lines = [f"gguf: {self.architecture}, {size}"]
        if self.difference is None:
            return [*lines, f"logits were not compared: that needs llama.cpp, {llama_cpp.INSTALL}"]
        lines.append(
            f"in float32 its logits in {self.engine} differ from the converted model's "
            f"{self.difference.line()}"
        )
        if self.rounded is not None:
            lines.append(f"as {self.type} they differ {self.rounded.line()}")
        return lines


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    type: str = "f16",
    idle_attention: bool = False,
    text: str | None = None,
    text_field: str = "text",
    revision: str | None = None,
) -> GgufExport:
    """Write the converted model `model` into the GGUF file `out`.

    Args:
        model: a converted model: a folder or a hub id.
        out: the new file.
        type: "f32", "f16", "bf16", "q8_0" or "q4_k_m". llama.cpp has to be installed for the last.
        idle_attention: append an attention layer that changes nothing. llama.cpp needs one in a
            model whose layers are all recurrent, except for the mixer rwkv.
        text: text to compare logits on, a file or a hub data set; by default Python's manual.
        text_field: the field of a record that holds its text.
        revision: revision of the hub id.

    If llama.cpp is not installed, transformers' class of the same architecture is compared.

    Raises UserError for a model that llama.cpp cannot hold, for another mistake of a user, and for
    logits that differ by more than 1e-3 of the largest one. Then it leaves no file behind.
    """
    out = Path(out).expanduser()
    check_new(out)
    checkpoint = find_checkpoint(str(model), revision)
    source = _source(checkpoint, idle_attention, text, text_field)
    kinds = tensor_types(source.model, type)
    if made_by_llama_cpp(kinds):
        llama_cpp.version()  # that it is installed
    exact = [F32] * len(kinds)  # such a file comes first, to be compared
    sizes = (sum(map(stored_bytes, source.model.tensors, x)) for x in (exact, kinds))
    check_space(out, max(sizes))
    with staged_file(out) as staging:
        engine, exact, rounded = source.write(staging, type, out.stem)
        return GgufExport(
            architecture=source.model.architecture,
            tensors=len(kinds),
            bytes=staging.stat().st_size,
            type=type,
            engine=engine,
            difference=exact,
            rounded=rounded,
        )


@dataclass(frozen=True)
class _Source:
    """What a file is written from, and the tokens on which it is compared."""

    checkpoint: Checkpoint
    model: GgufModel
    native: NativeModel | None
    words: dict[str, Any]
    tokens: Tensor  # [1, PROMPT + STEPS]

    def write(
        self, file: Path, type: str, name: str
    ) -> tuple[str | None, Difference | None, Difference | None]:
        """Write the file. Returns what computed its logits, and their differences in float32 and in
        the type, if it is another one."""
        write = partial(write_gguf, self.model, self.words, file, description={"name": name})
        if not llama_cpp.is_installed():
            found = self._native_difference()
            write(type)
            return found and "transformers", found, None
        config = self.checkpoint.config()
        load = self.checkpoint.tensors(config).load
        expected = logits_of(config, load, self.tokens, STEPS)
        write("f32")
        exact = difference(expected, self._logits(file))
        check_difference(exact)
        if type == "f32":
            return llama_cpp.version(), exact, None
        write(type)
        return llama_cpp.version(), exact, difference(expected, self._logits(file))

    def _logits(self, file: Path) -> Tensor:
        """[T, V] in llama.cpp, the last STEPS tokens read one by one. Raises UserError if it reads
        a text as other tokens."""
        tokens = self.tokens[0].tolist()
        with LlamaCpp(file, context=PROMPT + STEPS) as engine:
            tokenizer = self.checkpoint.tokenizer()
            text = tokenizer.decode(tokens)
            if engine.tokenize(text) != tokenizer(text)["input_ids"]:
                raise UserError(
                    f"llama.cpp reads a text as other tokens than the tokenizer of "
                    f"{self.checkpoint.name!r}: report it with its tokenizer.json"
                )
            first = engine.read(tokens[:PROMPT])
            return torch.cat([first, *(engine.read([token]) for token in tokens[PROMPT:])])

    def _native_difference(self) -> Difference | None:
        """The difference of transformers' class, if it has one of this architecture."""
        if self.native is None:
            return None
        config = self.checkpoint.config()
        expected = logits_of(config, self.checkpoint.tensors(config).load, self.tokens, STEPS)
        loads = {name: load for name, _, load in self.native.tensors}
        made = AutoConfig.for_model(**self.native.config)
        found = difference(
            expected, logits_of(made, lambda name: loads[name](), self.tokens, STEPS)
        )
        check_difference(found)
        return found


def _source(
    checkpoint: Checkpoint, idle_attention: bool, text: str | None, text_field: str
) -> _Source:
    """Raises UserError for a model that llama.cpp cannot hold."""
    config = checkpoint.config()
    check_exportable(checkpoint, config, "gguf")
    if needs_attention(config):
        check_idle_attention(config, "gguf", idle_attention)
    elif idle_attention:
        raise UserError("--idle-attention is not for rwkv, which needs no attention: leave it out")
    if not any(checkpoint.folder.glob("tokenizer*")):
        raise UserError(f"model {checkpoint.name!r} has no tokenizer, which a GGUF file holds")
    words = vocabulary(checkpoint.tokenizer(), config.vocab_size)
    model, native = gguf_model(checkpoint, idle_attention)
    tokens = sample(checkpoint, text, text_field)
    return _Source(checkpoint, model, native, words, tokens)
