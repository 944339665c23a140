"""Reads the tensors of a checkpoint one at a time. Nothing is unpickled."""

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from supra.checkpoint.json_files import read_fields
from supra.checkpoint.untrusted import check_opened, own_file
from supra.errors import UserError, shown

# the kinds of mistakes in a checkpoint's tensors that `from_pretrained` lists
KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class FolderReader:
    """The tensors of a folder of safetensors files. `specs` lists them; `load` reads one.

    `sources` maps a tensor's name in the model to its name in the files.
    """

    def __init__(self, folder: Path):
        self._files = _files_by_tensor(folder)
        self._starts: dict[Path, dict[str, int]] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.sources = {name: name for name in self._files}
        for file in dict.fromkeys(self._files.values()):
            names = [name for name, own in self._files.items() if own == file]
            with _damage(file), safe_open(file, framework="pt") as opened:
                parts = {name: opened.get_slice(name) for name in names}
                self._starts[file] = _starts(file)
            self.specs |= {name: _spec(name, part) for name, part in parts.items()}

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename tensors. `names` maps a name in the files to the name in the model."""
        self.specs = {names[name]: spec for name, spec in self.specs.items()}
        self.sources = {new: old for old, new in names.items()}

    def load(self, name: str) -> Tensor:
        """Read one tensor. It is not mapped, because what was read of a mapped file stays in
        memory."""
        source, spec = self.sources[name], self.specs[name]
        file = self._files[source]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        with _damage(file), file.open("rb") as opened:
            opened.seek(self._starts[file][source])
            if opened.readinto(raw_bytes(tensor)) < spec.nbytes:
                raise SafetensorError("it ends within a tensor")
        return tensor

    def read_ahead(self, name: str) -> None:
        """Have the system read a tensor into its cache, while others are computed."""
        source, nbytes = self.sources[name], self.specs[name].nbytes
        file = self._files[source]
        if hasattr(os, "posix_fadvise"):
            with _damage(file), file.open("rb") as opened:
                start = self._starts[file][source]
                os.posix_fadvise(opened.fileno(), start, nbytes, os.POSIX_FADV_WILLNEED)


class ModuleReader:
    """The tensors of a model in memory, for formats that only transformers can read."""

    def __init__(self, model: nn.Module):
        self._tensors = {
            name: x for name, x in model.state_dict().items() if name not in tied_names(model)
        }
        self.specs = {n: TensorSpec(tuple(x.shape), x.dtype) for n, x in self._tensors.items()}
        self.sources = {name: name for name in self._tensors}

    def load(self, name: str) -> Tensor:
        return self._tensors[name]

    def read_ahead(self, name: str) -> None:
        """Nothing: the tensors are in memory."""


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy if it is contiguous."""
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def tied_names(model: nn.Module) -> Mapping[str, str]:
    """Tied tensors, each with the name that it is stored under: lm_head with the embeddings."""
    return model.all_tied_weights_keys if model.config.tie_word_embeddings else {}


def check_complete(
    loading_info: Mapping[str, Collection], prefix: str = "", below: Collection[str] = ()
) -> None:
    """Raise UserError unless `from_pretrained` found exactly the model's tensors in their shapes.

    For the kinds of mistakes in `below`, only names that begin with `prefix` count.
    """
    for kind in KINDS:
        # mismatched names come in a tuple with their shapes
        names = sorted(x if isinstance(x, str) else x[0] for x in loading_info[kind])
        if kind in below:
            names = [name for name in names if name.startswith(prefix)]
        if names:
            raise UserError(
                f"{len(names)} {kind.replace('_', ' ')} in the checkpoint, first {names[0]}: "
                "its tensors do not match its config; convert or download it again"
            )


def check_safetensors(folder: Path) -> None:
    """Raise UserError unless all weights of the folder are safetensors files that open."""
    for file in set(_files_by_tensor(folder).values()):
        with _damage(file), safe_open(file, framework="pt"):
            pass


def model_names(
    model: PreTrainedModel, stored: Iterable[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The model's name for each stored tensor, as two mappings: tensors that become one parameter
    each, and tensors that transformers fuses with others. Files may use older names, as GPT-NeoX's
    head does."""
    mapping = get_model_conversion_mapping(model)
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    prefix, own, alone, fused = model.base_model_prefix, model.state_dict(), {}, {}
    for name in stored:
        known, pattern = rename_source_key(name, renamings, converters, prefix, own)
        (alone if pattern is None else fused)[name] = known
    return alone, fused


def check_fits(name: str, spec: TensorSpec, own: Tensor) -> None:
    """Raise UserError unless a stored tensor has the shape of the model's tensor `own`, and both or
    neither of them hold floats."""
    if spec.shape != tuple(own.shape):
        raise UserError(
            f"tensor {name} has shape {list(spec.shape)}, but its config says {list(own.shape)}: "
            "weights and config do not belong together, download the model again"
        )
    if spec.dtype.is_floating_point != own.is_floating_point():
        raise UserError(
            f"tensor {name} is stored as {str(spec.dtype).removeprefix('torch.')}, but the model "
            f"needs {str(own.dtype).removeprefix('torch.')}: use the original weights, which are "
            "not quantised"
        )


def check_tensors(folder: Path, model: PreTrainedModel) -> None:
    """Raise UserError unless the stored tensors match those of `model`, a model on the meta device.

    transformers would first allocate all the memory that a config asks for, and it would accept
    integers as weights.
    """
    own, stored = model.state_dict(), _stored(folder)
    alone, fused = model_names(model, stored)
    for name, known in alone.items():
        shape, dtype = stored[name]
        if known in own and dtype in DTYPES:
            check_fits(known, TensorSpec(shape, DTYPES[dtype]), own[known])
    for known in set(fused.values()) & own.keys():
        count = sum(math.prod(stored[name][0]) for name in fused if fused[name] == known)
        if own[known].numel() > count:
            raise UserError(
                f"tensor {known} has {own[known].numel()} values by its config, but its parts have "
                f"{count}: weights and config do not belong together, download the model again"
            )
    missing = own.keys() - {*alone.values(), *tied_names(model)}
    for pattern in model._keys_to_ignore_on_load_missing or ():
        missing = {name for name in missing if not re.search(pattern, name)}
    if not fused:
        check_complete({**dict.fromkeys(KINDS, ()), "missing_keys": missing})


def _stored(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape of each stored tensor, and safetensors' name of its dtype."""
    found = {}
    for file in set(_files_by_tensor(folder).values()):
        with _damage(file), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                part = opened.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype()
    return found


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    """The file of each tensor. If a folder has both a single file and an index, the single file is
    read, as in transformers."""
    check_opened(folder)
    if (folder / SINGLE).is_file():
        with _damage(folder / SINGLE), safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    raise UserError(
        f"{folder.name} holds no safetensors weights: pickled weights (.bin, .pt) are not opened; "
        "save the model with save_pretrained first"
    )


def _indexed_files(folder: Path) -> dict[str, Path]:
    weight_map = read_fields(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{INDEX} is damaged: weight_map (={shown(weight_map)}) must name the file of every "
            "tensor; download the model again"
        )
    files = {name: own_file(folder, file, INDEX) for name, file in weight_map.items()}
    for file in sorted(set(files.values())):
        if file.suffix != ".safetensors":  # transformers would open a pickle
            raise UserError(
                f"{INDEX} names {file.name!r}, but weights are only read from *.safetensors: "
                "download the model again, or save it with save_pretrained"
            )
    return dict(sorted(files.items(), key=lambda item: (item[1], item[0])))


def _starts(file: Path) -> dict[str, int]:
    """Where the bytes of each tensor begin, in a file that safetensors has opened."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        start = opened.tell()
    return {
        name: start + field["data_offsets"][0]
        for name, field in header.items()
        if name != "__metadata__"
    }


def _spec(name: str, part: Any) -> TensorSpec:
    """Shape and dtype of a slice of safetensors."""
    dtype = part.get_dtype()
    if dtype not in DTYPES:
        raise UserError(
            f"tensor {name} is stored as {dtype}: a quantised checkpoint cannot be converted, use "
            "the original weights"
        )
    return TensorSpec(tuple(part.get_shape()), DTYPES[dtype])


@contextmanager
def _damage(shard: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        if shard.exists():  # safetensors also raises this for a missing permission
            raise UserError(
                f"shard {shard.name} may not be read: permission denied; ask its owner for "
                "permission to read it"
            ) from None
        raise UserError(f"shard {shard.name} is missing: download the model again") from None
    except OSError as error:  # it is a folder, or the disk fails
        raise UserError(
            f"shard {shard.name} cannot be read ({error}): download the model again"
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"shard {shard.name} is truncated or not what the index says ({error}): "
            "download the model again"
        ) from error
