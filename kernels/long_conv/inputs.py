"""What every backend of the long convolution takes."""

from typing import NamedTuple

from torch import Tensor

from supra.kernels.checks import sequences
from supra.kernels.long_conv.modes import Model


class Inputs(NamedTuple):
    """The arguments that api.py describes, checked.

    The model's log_decay, frequency, weight and skip and the state are of one dtype, which is
    computed in.
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor
    log_decay: Tensor
    frequency: Tensor
    weight: Tensor
    skip: Tensor | None
    state: Tensor | None
    cu_seqlens: Tensor | None
    chunk_size: int
    backend: str

    @property
    def model(self) -> Model:
        return Model(*self[3:7])

    @property
    def key_width(self) -> int:
        return 1 if self.key is None else self.key.shape[3]

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """Output [B, T, H, V] and final state [N, H, M, 2, K, V]."""
        value, count = self.value, sequences(self.value, self.cu_seqlens)
        shape = (count, *self.log_decay.shape, 2, self.key_width, value.shape[3])
        return value.new_empty(value.shape), self.log_decay.new_empty(shape)
