"""Rewrite a converted model, with the same logits, as an architecture that other engines run.

    supra export ./rnn --to qwen3_5 --out ./served

Tensors are rewritten one at a time, so the model need not fit into memory. Before the new folder
appears, its logits are compared with those of the converted model.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from supra.checkpoint.config_rules import CONFIG, check_generation_config
from supra.checkpoint.files import check_space, check_vacant, staged_folder
from supra.checkpoint.opening import find_checkpoint
from supra.checkpoint.shard_writer import ShardWriter
from supra.checkpoint.weights import TensorSpec
from supra.errors import UserError, check_choice
from supra.export.comparison import Difference, check_difference, compare, sample
from supra.export.converted import cache_bytes
from supra.export.model_card import write_card
from supra.export.native import NativeModel
from supra.export.targets import FOLDERS, check_exportable, check_idle_attention
from supra.export.tokenizer import check_tokenizer, copy_tokenizer


@dataclass(frozen=True)
class Export:
    """What an export wrote, and how far its logits are from the converted model's.

    `difference` is before weights are rounded to `dtype`, and `rounded` after it, or None if no
    value changed. `idle_bytes`: what the idle attention layer adds to the state with every token.
    """

    target: str
    tensors: int
    bytes: int
    dtype: str
    difference: Difference
    rounded: Difference | None
    idle_bytes: int | None

    def lines(self) -> list[str]:
        """The export for a terminal."""
        rest = "" if self.dtype == "float32" else ", and the rest in float32"
        lines = [
            f"{self.target}: {self.tensors} tensors, {self.bytes / 1e6:,.1f} MB, matrices in "
            f"{self.dtype}{rest}",
            f"in float32 its logits differ from the converted model's {self.difference.line()}",
        ]
        if self.rounded is not None:
            lines.append(f"with weights rounded to {self.dtype} they differ {self.rounded.line()}")
        if self.idle_bytes is not None:
            lines.append(
                f"the idle attention layer caches {self.idle_bytes:,} bytes for every token"
            )
        return lines


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    idle_attention: bool = False,
    text: str | None = None,
    text_field: str = "text",
    shard_bytes: float = 4e9,
    revision: str | None = None,
    progress: bool = False,
) -> Export:
    """Write the converted model `model` into the folder `out` as the architecture `to`.

    Args:
        model: a converted model: a folder or a hub id.
        out: the new folder; it must be missing or empty.
        to: "qwen3_5" or "granite".
        dtype: dtype of matrices and embeddings; None takes the model's own. Vectors and
            convolutions are float32.
        idle_attention: append an attention layer that changes nothing. Engines need one in a model
            whose layers are all recurrent.
        text: text to compare logits on, a file or a hub data set; by default Python's manual.
        text_field: the field of a record that holds its text.
        shard_bytes: maximum size of one safetensors file.
        revision: revision of the hub id.
        progress: show progress bars.

    Raises UserError for a model that the architecture cannot hold, for another mistake of a user,
    and for logits that differ by more than 1e-3 of the largest one. Then it leaves no folder
    behind.
    """
    out = Path(out).expanduser()
    check_choice("--to", to, FOLDERS)
    check_vacant(out)
    if not shard_bytes > 0:
        raise UserError(f"shard_bytes (={shard_bytes}) must be positive")
    checkpoint = find_checkpoint(str(model), revision)
    config = checkpoint.config()
    check_exportable(checkpoint, config, to)
    check_idle_attention(config, to, idle_attention)
    with checkpoint.named():
        check_generation_config(checkpoint.folder)
    tokens = sample(checkpoint, text, text_field)
    native = FOLDERS[to].native_model(checkpoint, idle_attention)
    dtype = dtype or config.dtype
    native.config["dtype"] = str(dtype).removeprefix("torch.")
    size = sum(
        torch.Size(x.shape).numel() * _stored(x.shape, dtype).itemsize for x in native.tensors
    )
    check_space(out, size)
    with staged_folder(out) as staging:
        copy_tokenizer(checkpoint, staging)
        rounded = write_tensors(native, staging, dtype, shard_bytes, progress)
        (staging / CONFIG).write_text(json.dumps(native.config, indent=2, allow_nan=False) + "\n")
        check_tokenizer(checkpoint, staging, tokens)
        exact, stored = compare(checkpoint, native, staging, tokens, rounded)
        check_difference(exact)
        result = Export(
            target=to,
            tensors=len(native.tensors),
            bytes=size,
            dtype=native.config["dtype"],
            difference=exact,
            rounded=stored,
            idle_bytes=idle_bytes(native, dtype) if idle_attention else None,
        )
        words = ["supra", "export", checkpoint.public_name, "--to", to, "--out", f"./{out.name}"]
        words += ["--dtype", result.dtype, *["--idle-attention"] * idle_attention]
        write_card(staging, checkpoint.folder, out.name, result.lines(), shlex.join(words))
    return result


def _stored(shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is written in: `dtype` for matrices and embeddings only."""
    return dtype if len(shape) == 2 else torch.float32


def write_tensors(
    native: NativeModel, folder: Path, dtype: torch.dtype, shard_bytes: float, progress: bool
) -> bool:
    """Write the tensors one at a time. Returns whether the dtype changed a value."""
    specs = {x.name: TensorSpec(x.shape, _stored(x.shape, dtype)) for x in native.tensors}
    writer, rounded = ShardWriter(folder, specs, shard_bytes), False
    for name, shape, load in tqdm(native.tensors, "export", unit="tensor", disable=not progress):
        tensor = load()
        stored = tensor.to(_stored(shape, dtype))
        if tuple(stored.shape) != shape or not stored.isfinite().all():
            raise UserError(
                f"tensor {name} is not finite in dtype {str(stored.dtype).removeprefix('torch.')}: "
                "give --dtype float32 or bfloat16, or use an earlier checkpoint"
            )
        rounded = rounded or not torch.equal(stored.to(tensor.dtype), tensor)
        writer.add(name, stored)
    writer.finish()
    return rounded


def idle_bytes(native: NativeModel, dtype: torch.dtype) -> int:
    """Bytes that the idle attention layer caches for every token."""
    heads, hidden = native.config["num_attention_heads"], native.config["hidden_size"]
    size = native.config.get("head_dim", hidden // heads)
    return cache_bytes(native.config["num_key_value_heads"], size, dtype.itemsize)
