"""Files that are written tensor by tensor: what safetensors and FolderReader read from them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from supra.checkpoint.shard_writer import ShardWriter
from supra.checkpoint.weights import INDEX, SINGLE, FolderReader, TensorSpec
from supra.errors import UserError

TENSORS = {
    "odd": torch.randn(3, 1).bfloat16(),
    "wide": torch.randn(5, 7),
    "transposed": torch.randn(7, 5).T,
    "double": torch.randn(3, dtype=torch.float64),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
    "long": torch.arange(5),
}
SPECS = {name: TensorSpec(tuple(x.shape), x.dtype) for name, x in TENSORS.items()}


def write(folder, shard_bytes, names=tuple(TENSORS)):
    writer = ShardWriter(folder, SPECS, shard_bytes)
    for name in names:
        writer.add(name, TENSORS[name])
    writer.finish()


@pytest.mark.parametrize("shard_bytes", [1, 100, 1e9])
def test_what_was_written_is_read(tmp_path, shard_bytes):
    write(tmp_path, shard_bytes, reversed(TENSORS))  # in any order
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == {1: 8, 100: 4, 1e9: 1}[shard_bytes]
    stored = {name: x for file in files for name, x in load_file(file).items()}
    reader = FolderReader(tmp_path)
    assert stored.keys() == TENSORS.keys() == reader.specs.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype
        assert torch.equal(reader.load(name), tensor) and reader.specs[name] == SPECS[name]
    if len(files) == 1:
        assert files[0].name == SINGLE
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in TENSORS.values())
        assert {tmp_path / name for name in index["weight_map"].values()} == set(files)


def test_numbers_are_aligned(tmp_path):
    """A reader that maps the file can view each tensor in its dtype."""
    write(tmp_path, 1e9)
    with safe_open(tmp_path / SINGLE, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    data = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, spec in SPECS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % spec.dtype.itemsize == 0


def test_a_tensor_that_was_not_announced_so(tmp_path):
    writer = ShardWriter(tmp_path, SPECS, 1e9)
    with pytest.raises(ValueError, match="announced as"):
        writer.add("wide", TENSORS["wide"].double())
    with pytest.raises(ValueError, match="not written"):
        writer.finish()


def test_a_file_that_ends_within_a_tensor(tmp_path):
    write(tmp_path, 1e9)
    reader = FolderReader(tmp_path)
    file = tmp_path / SINGLE
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="is truncated"):
        for name in TENSORS:
            reader.load(name)
