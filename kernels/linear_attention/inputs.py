"""What every backend of linear attention takes."""

from typing import NamedTuple

from torch import Tensor

from supra.kernels.checks import given_or_zeros
from supra.kernels.operators import empty_head_results


class Inputs(NamedTuple):
    """The arguments that api.py describes, checked; memory and normalizer are the initial state."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None
    memory: Tensor | None
    normalizer: Tensor | None
    cu_seqlens: Tensor | None
    normalized: bool
    scale: float
    eps: float
    chunk_size: int
    backend: str

    @property
    def state_heads(self) -> int:
        return (self.key.shape[2:3] if self.log_decay is None else self.log_decay.shape)[-1]

    def start(self) -> tuple[Tensor, Tensor | None]:
        """Memory and normalizer before the first token, zeros where they are not given."""
        memory, normalizer = given_or_zeros(self.memory, self), self.normalizer
        if self.normalized and normalizer is None:
            normalizer = memory.new_zeros(memory.shape[:3])
        return memory, normalizer

    def empty_results(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Output [B, T, Hq, V], final memory and normalizer, and sums of the weights [B, T, Hq].

        The last two are None when not normalized.
        """
        output, memory = empty_head_results(self, self.state_heads)
        if not self.normalized:
            return output, memory, None, None
        weights = memory.new_empty(self.query.shape[:3])
        return output, memory, memory.new_empty(memory.shape[:3]), weights
