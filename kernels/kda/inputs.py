"""What every backend of Kimi Delta Attention takes."""

from typing import NamedTuple

from torch import Tensor

from supra.kernels.operators import empty_head_results


class Inputs(NamedTuple):
    """The arguments that api.py describes, checked."""

    query: Tensor
    key: Tensor
    value: Tensor
    beta: Tensor
    log_decay: Tensor
    state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    chunk_size: int
    backend: str

    empty_results = empty_head_results
