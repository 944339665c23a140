"""Launches of the convolution's Triton kernels; for what they compute see triton_kernels.py."""

from typing import Any

import torch
from torch import Tensor

from supra.kernels.causal_conv import triton_kernels as kernels
from supra.kernels.causal_conv.inputs import Inputs
from supra.kernels.launch import ALL_CHANNELS, Rows, Table, Tiling, sequences
from supra.kernels.plan import Plan, contiguous_rows

TILE = 32  # tokens

# channels of a tile: one full line of 128 bytes a row in bf16; a step has one row, so it is wider
TILINGS: Table = {
    "forward": {"any": ((ALL_CHANNELS, Tiling(64, 64, 4, 1)),)},
    "backward_sums": {"any": ((ALL_CHANNELS, Tiling(64, 64, 4, 1)),)},
    "backward_window": {"any": ((ALL_CHANNELS, Tiling(64, 64, 4, 1)),)},
    "step": {"any": ((ALL_CHANNELS, Tiling(256, 256, 1, 1)),)},
}


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and final state."""
    plan = _Rows(x)
    output, end = (torch.empty_like(y, dtype=plan.dtype) for y in x.empty_results())
    plan.launch(kernels.forward, plan.grid(kernels.forward), output=output, end=end)
    return output.to(x.input.dtype), end.to(x.input.dtype)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; the sums before silu are computed again."""
    plan, kernel = _Rows(x), kernels.backward_sums
    (width, taps), d_output = x.weight.shape, d_output.contiguous()
    d_sum = torch.empty_like(d_output, dtype=plan.dtype) if x.silu else d_output
    partial = plan.new_sums(plan.chunks, taps + 1, width)
    plan.launch(kernel, plan.grid(kernel), d_output=d_output, d_sum=d_sum, partial=partial)
    d_input = torch.empty(x.input.shape, dtype=plan.dtype, device=plan.device)
    d_state = None if x.state is None else d_input.new_empty(x.state.shape)
    kernel = kernels.backward_window
    plan.launch(
        kernel, plan.grid(kernel), d_sum=d_sum, d_input=d_input, d_state=d_state,
        d_end=None if d_end is None else d_end.contiguous(),
    )  # fmt: skip
    sums = partial.sum(0)
    return (
        d_input.to(x.input.dtype),
        sums[:-1].T.to(x.weight.dtype).contiguous(),
        None if x.bias is None else sums[-1].to(x.bias.dtype, copy=True),
        None if x.state is None else d_state.to(x.state.dtype),
    )


def recurrent(x: Inputs) -> Tensor:
    """Output [B, 1, D] for the next token [B, 1, D]; the state is overwritten."""
    plan, batch = _Channels(x), len(x.input)
    output = torch.empty(x.input.shape, dtype=plan.dtype, device=plan.device)
    grid = batch, plan.blocks(kernels.step)[1]
    plan.launch(kernels.step, grid, state=x.state, output=output)
    return output.to(x.input.dtype)


class _Channels(Plan):
    """What all kernels take: the input and the taps of every channel."""

    def __init__(self, x: Inputs):
        input, (width, taps) = contiguous_rows(x.input), x.weight.shape
        super().__init__(
            TILINGS, (width, width), (input,), input=Rows.of(input),
            weight=x.weight.T.contiguous(), bias=None if x.bias is None else x.bias.contiguous(),
            WIDTH=width, TAPS=taps, SILU=x.silu,
        )  # fmt: skip

    def sizes(self, cut: Tiling) -> dict[str, int]:
        return {"BLOCK": cut.value}


class _Rows(_Channels):
    """Whole sequences. A sequence of n tokens has W - 1 + n rows: its state, then its tokens.

    They are cut into chunks of TILE rows; a program has one chunk of some channels. Nothing waits
    for cu_seqlens: there are as many programs as there could be chunks.
    """

    def __init__(self, x: Inputs):
        super().__init__(x)
        seqs, self.chunks = sequences(x.input, x.cu_seqlens, TILE, x.weight.shape[1] - 1)
        state = None if x.state is None else x.state.contiguous()
        self.given |= {"state": state, "seqs": seqs, "TILE": TILE}

    def grid(self, kernel: Any) -> tuple[int, int]:
        return self.chunks, self.blocks(kernel)[1]
