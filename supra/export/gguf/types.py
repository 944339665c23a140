"""The type that each tensor of a GGUF file is stored in."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from supra.errors import UserError, check_choice
from supra.export import llama_cpp
from supra.export.gguf.model import GgufModel
from supra.export.native import NativeTensor

# llama.cpp's numbers of types and of kinds of files
F32, F16, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 6, 7, 8, 12, 13, 14, 30
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_k_m": 15}
TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_k_m": Q4_K}
BLOCK = 32  # values of a row that share a scale in every type that is narrower than 16 bits
LONG_BLOCK = 256  # in types with a K
# what llama.cpp takes where long blocks do not divide a row
_SHORTER = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}
# small, or read by operations that take float32 alone
_FLOAT32 = re.compile(r"ssm_conv1d|norm\.|time_mix_(w\d|decay|lerp)")


def tensor_types(model: GgufModel, name: str) -> list[int]:
    """The type of each of the model's tensors, in a file of the type `name`.

    Raises UserError if blocks of 32 values do not divide a row. Where only the longer blocks of
    q4_k_m do not divide it, the tensor gets the type with short blocks that llama.cpp takes then.
    """
    check_choice("type", name, TYPES)
    names = [tensor.name for tensor in model.tensors]
    found = []
    for tensor in model.tensors:
        kind = TYPES[name]
        matrix = len(tensor.shape) >= 2 and tensor.name.endswith("weight")
        if not matrix or _FLOAT32.search(tensor.name):
            kind = F32
        elif name == "q4_k_m":
            kind = _mixed(tensor.name, names)
        _check_blocks(tensor, kind, name)
        found.append(_SHORTER.get(kind, kind) if tensor.shape[-1] % LONG_BLOCK else kind)
    return found


def _check_blocks(tensor: NativeTensor, kind: int, name: str) -> None:
    if kind not in (F32, F16, BF16) and tensor.shape[-1] % BLOCK:
        raise UserError(
            f"type (={name}) needs rows of a multiple of {BLOCK} values, and {tensor.name} has "
            f"{tensor.shape[-1]}: use f16 or bf16"
        )


def _mixed(name: str, names: Sequence[str]) -> int:
    """The type in a file of type q4_k_m, by llama.cpp's rule for it: 6 bits for the output, and for
    half of the values and of the MLPs' last matrices, which lose the most; otherwise 4 bits."""
    part = name.removesuffix(".weight").rpartition(".")[2]
    if part == "output" or (part == "token_embd" and "output.weight" not in names):
        return Q6_K
    if part == "attn_qkv":
        return Q5_K
    if part not in ("attn_v", "ffn_down"):
        return Q4_K
    alike = [other for other in names if other.endswith(f".{part}.weight")]
    place, count = alike.index(name), len(alike)
    outer = place < count // 8 or place >= 7 * count // 8
    return Q6_K if outer or (place - count // 8) % 3 == 2 else Q4_K


def row_bytes(kind: int, width: int) -> int:
    """The bytes of a row of `width` values."""
    sizes = {F32: (4, 1), F16: (2, 1), BF16: (2, 1), Q8_0: (34, 32), Q5_0: (22, 32), Q5_1: (24, 32)}
    sizes |= {Q4_K: (144, 256), Q5_K: (176, 256), Q6_K: (210, 256)}
    size, block = sizes[kind]
    return width // block * size


def encoded(tensor: Tensor, kind: int) -> Tensor:
    """The tensor in the type `kind`, float or uint8 blocks of rows."""
    if kind == F32:
        return tensor.float()
    if kind == F16:
        return tensor.half()
    if kind == BF16:
        return tensor.bfloat16()
    rows = tensor.float().reshape(-1, tensor.shape[-1])
    if kind == Q8_0:
        return _eight_bits(rows)
    return llama_cpp.quantise(rows, kind)


def _eight_bits(rows: Tensor) -> Tensor:
    """Blocks of 32 values: their scale in float16, and 8 bits of each."""
    blocks = rows.unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0, 1 / scale)
    # away from zero at a half, as in C
    scaled = blocks * inverse
    whole = (scaled.abs() + 0.5).floor() * scaled.sign()
    bits = torch.cat([scale.half().view(torch.uint8), whole.to(torch.int8).view(torch.uint8)], -1)
    return bits.flatten(1)


def stored_bytes(tensor: NativeTensor, kind: int) -> int:
    """The bytes of a tensor in the type `kind`."""
    return math.prod(tensor.shape[:-1]) * row_bytes(kind, tensor.shape[-1])


def made_by_llama_cpp(kinds: Sequence[int]) -> bool:
    """Whether llama.cpp's quantiser makes one of these types."""
    return any(kind not in (F32, F16, BF16, Q8_0) for kind in kinds)
