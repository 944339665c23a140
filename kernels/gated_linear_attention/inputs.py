"""What every backend of gated linear attention takes."""

from typing import NamedTuple

from torch import Tensor

from supra.kernels.operators import empty_head_results


class Inputs(NamedTuple):
    """The arguments that api.py describes, checked."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    bonus: Tensor | None
    state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    chunk_size: int
    backend: str

    empty_results = empty_head_results
