"""What every backend of the nonlinear gated recurrence takes."""

from typing import NamedTuple

from torch import Tensor

from supra.kernels.checks import sequences, state_dtype
from supra.kernels.chunks import count_chunks


class Inputs(NamedTuple):
    """The arguments that api.py describes, checked.

    save_states: whether the backward pass will ask for the states before every chunk.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    weight: Tensor
    state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    sweeps: int
    tolerance: float
    chunk_size: int
    save_states: bool
    backend: str

    def empty_results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output [B, T, H, V], final state [N, H, K, V], and two without a gradient.

        Those are the states before every chunk, [chunks, H, K, V], which the backward pass begins
        from (none unless save_states), and [2, N, H], the largest residual and the most sweeps of a
        chunk.
        """
        query, value, weight = self.query, self.value, self.weight
        unit = 16 if self.backend == "triton" else 1  # its tensors are as wide as launch.operands()
        widths = (-(-width // unit) * unit for width in weight.shape[1:])
        chunks = count_chunks(query, self.cu_seqlens, self.chunk_size) if self.save_states else 0
        number, heads = sequences(query, self.cu_seqlens), weight.shape[0]
        wide = query.new_empty(0, dtype=state_dtype(query, self.key, value))
        return (
            value.new_empty(value.shape),
            wide.new_empty(number, *weight.shape),
            wide.new_empty(chunks, heads, *widths),
            wide.new_empty(2, number, heads),
        )
