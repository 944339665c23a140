"""Launches of the convolution's Triton kernels; for what they compute see triton_kernels.py."""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from supra.kernels import checks, launch
from supra.kernels.causal_conv import triton_kernels as kernels
from supra.kernels.launch import Table, Tiling

TILE = 32  # tokens

# channels of a tile: one full line of 128 bytes a row in bf16; a step has one row, so it is wider
TILINGS: Table = {
    "forward": {"any": ((1 << 16, Tiling(64, 64, warps=4, stages=1)),)},
    "sums": {"any": ((1 << 16, Tiling(64, 64, warps=4, stages=1)),)},
    "window": {"any": ((1 << 16, Tiling(64, 64, warps=4, stages=1)),)},
    "step": {"any": ((1 << 16, Tiling(256, 256, warps=1, stages=1)),)},
}


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of operator.forward."""
    rows = _Rows(input, weight, bias, state, cu_seqlens, silu)
    dtype = launch.storage_dtype(input.dtype)
    output = torch.empty(input.shape, dtype=dtype, device=input.device)
    end = output.new_empty(rows.sequences, weight.shape[1] - 1, input.shape[2])
    rows.launch("forward", kernels.forward, output=output, end=end)
    return output.to(input.dtype), end.to(input.dtype)


def backward(
    d_output: Tensor,
    d_end: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Arguments and results are those of operator.backward; the sums before silu are redone."""
    rows = _Rows(input, weight, bias, state, cu_seqlens, silu)
    dtype, taps, width = launch.storage_dtype(input.dtype), weight.shape[1], input.shape[2]
    d_output = d_output.contiguous()
    d_sum = torch.empty_like(d_output, dtype=dtype) if silu else d_output
    partial = torch.empty(rows.chunks, taps + 1, width, dtype=torch.float32, device=input.device)
    rows.launch(
        "sums", kernels.backward_sums, d_output=d_output, d_sum=d_sum, partial=partial,
        PRECISION=launch.precision(input),
    )  # fmt: skip
    d_input = torch.empty(input.shape, dtype=dtype, device=input.device)
    d_state = None if state is None else d_input.new_empty(state.shape)
    rows.launch(
        "window", kernels.backward_window, d_sum=d_sum, d_input=d_input, d_state=d_state,
        d_end=None if d_end is None else d_end.contiguous(),
    )  # fmt: skip
    sums = partial.sum(0)
    return (
        d_input.to(input.dtype),
        sums[:-1].T.to(weight.dtype).contiguous(),
        None if bias is None else sums[-1].to(bias.dtype, copy=True),
        None if state is None else d_state.to(state.dtype),
    )


def step(input: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    """Output [B, D] for the next token [B, D]; state [B, W - 1, D] is overwritten."""
    (batch, width), taps = input.shape, weight.shape[1]
    input = input if input.stride(1) == 1 else input.contiguous()
    bias = None if bias is None else bias.contiguous()
    tiling = launch.tiling(TILINGS, "step", width, width, input.device)
    output = torch.empty(batch, width, dtype=launch.storage_dtype(input.dtype), device=input.device)
    launch.launch(
        kernels.step,
        (batch, triton.cdiv(width, tiling.value)),
        {
            "input": input, "weight": weight.T.contiguous(), "bias": bias,
            "state": state, "output": output, "batch_stride": input.stride(0),
        },
        tiling,
        WIDTH=width, TAPS=taps, SILU=silu, BLOCK=tiling.value,
    )  # fmt: skip
    return output.to(input.dtype)


class _Rows:
    """What all launches over whole sequences share.

    A sequence of n tokens has W - 1 + n rows: its state, then its tokens. They are cut into chunks
    of TILE rows; a program has one chunk of some channels. Nothing waits for cu_seqlens: there are
    as many programs as there could be chunks.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
    ):
        batch, length, self.width = input.shape
        taps = weight.shape[1]
        input = input if input.stride(2) == 1 else input.contiguous()
        offsets = None
        if cu_seqlens is None:
            self.sequences = batch
            self.chunks = batch * triton.cdiv(length + taps - 1, TILE)
        else:
            if cu_seqlens.device.type == "cpu":
                checks.bounds(cu_seqlens, batch, length)
            self.sequences = len(cu_seqlens) - 1
            self.chunks = (length + self.sequences * (taps - 1)) // TILE + self.sequences
            cu_seqlens = cu_seqlens.to(input.device, non_blocking=True)
            chunks = (cu_seqlens.diff() + taps - 1 + TILE - 1) // TILE
            offsets = F.pad(chunks.cumsum(0), (1, 0))
        self.arguments = {
            "input": input,
            "weight": weight.T.contiguous(),
            "bias": None if bias is None else bias.contiguous(),
            "state": None if state is None else state.contiguous(),
            "cu_seqlens": cu_seqlens,
            "chunk_offsets": offsets,
            "sequences": self.sequences,
            "length": length,
            "batch_stride": input.stride(0),
            "token_stride": input.stride(1),
        }
        self.constants = {
            "WIDTH": self.width,
            "TAPS": taps,
            "SILU": silu,
            "PACKED": cu_seqlens is not None,
            "TILE": TILE,
        }

    def launch(self, name: str, kernel, PRECISION: str | None = None, **tensors: Tensor | None):
        device = self.arguments["input"].device
        tiling = launch.tiling(TILINGS, name, self.width, self.width, device)
        constants = self.constants | {"BLOCK": tiling.value}
        if PRECISION is not None:
            constants["PRECISION"] = PRECISION
        grid = (self.chunks, triton.cdiv(self.width, tiling.value))
        launch.launch(kernel, grid, self.arguments | tensors, tiling, **constants)
