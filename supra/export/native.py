"""A converted model as a native architecture of transformers names and shapes it.

A target, such as qwen3_5 or granite, is one file with two functions. `obstacles(config)` says what
in a converted model's config the architecture cannot hold; `native_model(checkpoint)` rewrites it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class NativeTensor(NamedTuple):
    """One tensor of the exported model, which is read only when it is written.

    `name` is the architecture's name in transformers. `load` reads the tensors that it is made of,
    and returns it; nothing else holds its memory.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class NativeModel:
    """`config` holds the fields of config.json; `tensors` come in the order of the layers."""

    config: dict[str, Any]
    tensors: list[NativeTensor]
