"""Writes the tensors of a model into safetensors files, one at a time."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from supra.checkpoint.files import disk_errors, fsync
from supra.checkpoint.weights import DTYPES, INDEX, SINGLE, TensorSpec, raw_bytes

ALIGNMENT = 8  # bytes: what safetensors' own files begin their tensors at
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Shards of at most `shard_bytes`, or of one tensor, and their index.

    All tensors are announced in `specs`. So every file has its header and its size from the start,
    a tensor goes straight to its place, and none of them stays in memory.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], shard_bytes: float):
        self._folder, self._specs = folder, specs
        self._places: dict[str, tuple[Path, int]] = {}
        self._missing = set(specs)
        shards = _split(specs, shard_bytes)
        for number, names in enumerate(shards, 1):
            alone = len(shards) == 1
            file = SINGLE if alone else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(folder / file, {name: specs[name] for name in names})

    def _begin(self, file: Path, specs: Mapping[str, TensorSpec]) -> None:
        """Write the header of a file, and find the place of each tensor in it."""
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        # wide numbers first, so that all are aligned
        for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
            offsets[name], end = end, end + spec.nbytes
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": spec.shape,
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        with disk_errors(), file.open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            start = opened.tell()
            opened.truncate(start + end)
        self._places |= {name: (file, start + offset) for name, offset in offsets.items()}

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; it must be as its spec says."""
        spec = self._specs[name]
        if TensorSpec(tuple(tensor.shape), tensor.dtype) != spec:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {spec}")
        file, place = self._places[name]
        data = raw_bytes(tensor)
        # with a buffer it would take 5 to 10 times as long
        with disk_errors(), file.open("r+b", buffering=0) as opened:
            opened.seek(place)
            while data:  # Linux takes at most 2 GiB at once
                data = data[opened.write(data) :]
        self._missing.remove(name)

    def finish(self) -> None:
        """Force all files to the disk, and write the index if there are several."""
        if self._missing:
            raise ValueError(f"tensors that were announced and not written: {self._missing}")
        files = {file for file, _ in self._places.values()}
        with disk_errors():
            for file in files:
                fsync(file)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self._specs.values())},
                "weight_map": {name: file.name for name, (file, _) in self._places.items()},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._folder / INDEX).write_text(text)


def _split(specs: Mapping[str, TensorSpec], shard_bytes: float) -> list[list[str]]:
    """The names in each shard, in order."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, spec in specs.items():
        if shards[-1] and held + spec.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += spec.nbytes
    return shards
