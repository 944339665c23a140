"""Writes a GGUF file tensor by tensor, so memory is that of one tensor."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supra.errors import UserError
from supra.export.gguf.model import GgufModel
from supra.export.gguf.types import FILE_TYPES, encoded, stored_bytes, tensor_types

QUANTIZATION_VERSION = 2  # of the layout of blocks


def write_gguf(
    model: GgufModel,
    vocabulary: Mapping[str, Any],
    file: Path,
    type: str = "f32",
    description: Mapping[str, str] | None = None,
) -> None:
    """Write the file. `vocabulary` is what `vocabulary` returned for the model's tokenizer.

    description: more fields `general.*`, such as name.

    Raises UserError if the package gguf is missing, or if rows cannot be stored in that type.
    """
    kinds = tensor_types(model, type)
    writer = _writer(file, model.architecture)
    fields = {"type": "model", "file_type": FILE_TYPES[type], **(description or {})}
    fields["quantization_version"] = QUANTIZATION_VERSION
    for name, value in fields.items():
        _add(writer, f"general.{name}", value)
    for name, value in model.metadata.items():
        _add(writer, f"{model.architecture}.{name}", value)
    for name, value in vocabulary.items():
        _add(writer, name, value)
    _write_tensors(writer, model, kinds)


def _writer(file: Path, architecture: str) -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("writing a GGUF file needs the package gguf: pip install gguf") from None
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)  # it reports its plan
    return gguf.GGUFWriter(file, architecture)


def _add(writer: Any, name: str, value: Any) -> None:
    """Add a field, in the type of GGUF that llama.cpp reads this type of Python as."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _write_tensors(writer: Any, model: GgufModel, kinds: list[int]) -> None:
    import gguf
    import numpy

    for tensor, kind in zip(model.tensors, kinds, strict=True):
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            numpy.dtype("float32"),  # what is stored is the type below
            stored_bytes(tensor, kind),
            gguf.GGMLQuantizationType(kind),
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in zip(model.tensors, kinds, strict=True):
            stored = encoded(tensor.load(), kind)
            if stored.is_floating_point() and not stored.isfinite().all():
                raise UserError(
                    f"tensor {tensor.name} is not finite as "
                    f"{gguf.GGMLQuantizationType(kind).name.lower()}: give --type bf16, or use an "
                    "earlier checkpoint"
                )
            writer.write_tensor_data(_bytes(stored))
    finally:
        writer.close()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().view(torch.uint8).numpy()
