"""What every backend of the causal convolution takes."""

from typing import NamedTuple

from torch import Tensor

from supra.kernels.checks import sequences


class Inputs(NamedTuple):
    """The arguments that api.py describes, checked, with the state in the dtype of the input."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor | None
    cu_seqlens: Tensor | None
    silu: bool
    backend: str

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """Output [B, T, D] and final state [N, W - 1, D]."""
        count, taps = sequences(self.input, self.cu_seqlens), self.weight.shape[1]
        end = self.input.new_empty(count, taps - 1, self.input.shape[2])
        return self.input.new_empty(self.input.shape), end
