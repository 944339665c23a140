"""What every backend of the long convolutions takes."""

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


class FftInputs(NamedTuple):
    """The arguments of fft_conv, checked; kernel and state are of one dtype."""

    input: Tensor
    kernel: Tensor
    state: Tensor | None
    cu_seqlens: Tensor | None
    block_size: int | None

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """Output [B, T, H, D] and final state [N, L - 1, H, D]."""
        input, count = self.input, sequences(self.input, self.cu_seqlens)
        end = self.kernel.new_empty(count, self.kernel.shape[1] - 1, *input.shape[2:])
        return input.new_empty(input.shape), end
