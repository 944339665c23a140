"""The causal convolution in plain torch, for any device.

A batch goes in groups of rows, a packed row sequence by sequence, and their tokens in blocks that
stay in a core's cache. A window is the tokens of a block with the W - 1 inputs before them in
front, those of the state before the first block. On a CPU, 2048 tokens of 512 channels with 4 taps
take a third of the time of conv1d with its transposed copies.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels import checks
from supra.kernels.causal_conv.inputs import Inputs
from supra.kernels.chunks import Group, split_groups

BLOCK = 128 * 1024  # values, 512 KiB as float32


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and final state."""
    columns, bias = _parameters(x)
    output, end = torch.empty_like(x.input), checks.given_or_zeros(x.state, x).clone()
    for group in _groups(x):
        for begin, stop in _blocks(x, group):
            out, window = output[group.rows, begin:stop], _window(x, end, group, begin, stop)
            same = out if out.dtype == columns.dtype else None
            found = _convolve(window.to(columns.dtype), columns, bias, x.silu, same)
            if same is None:
                out.copy_(found)
        end[group.states] = window[:, stop - begin :]
    return output, end


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; the sums before silu are computed again."""
    columns, bias = _parameters(x)
    state, past = checks.given_or_zeros(x.state, x), len(columns) - 1
    d_state = checks.given_or_zeros(d_end, x).to(columns.dtype, copy=True)
    d_input = torch.empty_like(x.input)
    sums = columns.new_zeros(past + 2, columns.shape[1])  # of the columns, then of the bias
    for group in _groups(x):
        d_past = d_state[group.states]  # of the inputs that the next block has in front
        for begin, stop in reversed(list(_blocks(x, group))):
            window = _window(x, state, group, begin, stop).to(columns.dtype)
            d_sum = d_output[group.rows, begin:stop].to(columns.dtype)
            if x.silu:
                d_sum = torch.ops.aten.silu_backward(d_sum, _convolve(window, columns, bias, False))
            d_window = F.pad(d_past, (0, 0, stop - begin, 0))
            _accumulate(d_sum, window, columns, d_window, sums)
            d_input[group.rows, begin:stop] = d_window[:, past:]
            d_past = d_window[:, :past]
        d_state[group.states] = d_past
    return (
        d_input,
        sums[:-1].T.to(x.weight.dtype),
        None if x.bias is None else sums[-1].to(x.bias.dtype, copy=True),
        None if x.state is None else d_state.to(x.state.dtype),
    )


def plain(x: Inputs) -> tuple[Tensor, Tensor]:
    """`forward` for export, in operators that every runtime has; rows must not be packed."""
    columns, bias = _parameters(x)
    window = torch.cat((checks.given_or_zeros(x.state, x), x.input), 1)
    taps = columns.T[:, None]
    output = F.conv1d(window.to(columns.dtype).mT, taps, bias, groups=len(taps)).mT
    output = F.silu(output) if x.silu else output
    return output.to(x.input.dtype), window[:, x.input.shape[1] :]


def recurrent(x: Inputs, in_place: bool) -> tuple[Tensor, Tensor]:
    """Output [B, 1, D] for the next token [B, 1, D], and the state after it."""
    columns, bias = _parameters(x)
    window = torch.cat((x.state, x.input), 1)
    state = x.state.copy_(window[:, 1:]) if in_place else window[:, 1:]
    # one sum over all taps: tap by tap, 64 of them take 80 times as long
    output = torch.linalg.vecdot(window.to(columns.dtype), columns, dim=-2) + bias
    output = F.silu(output, inplace=in_place) if x.silu else output
    return output[:, None].to(x.input.dtype), state


def _parameters(x: Inputs) -> tuple[Tensor, Tensor]:
    """The columns of the weight as rows [W, D], and the bias [D], as they are computed with."""
    dtype = checks.state_dtype(*checks.present(x.input, x.weight, x.bias))
    columns = x.weight.to(dtype).T.contiguous()
    return columns, columns.new_zeros(columns.shape[1]) if x.bias is None else x.bias.to(dtype)


def _groups(x: Inputs) -> list[Group]:
    """Groups of as many rows as fit into a block."""
    length, width = x.input.shape[1:]
    return split_groups(x.input, x.cu_seqlens, max(1, BLOCK // max(1, length * width)))


def _blocks(x: Inputs, group: Group) -> Iterator[tuple[int, int]]:
    """First token of each block of a group and the one after it; only the first may be short of
    W - 1 inputs in front."""
    rows, width = group.rows.stop - group.rows.start, x.input.shape[2]
    size = max(1, x.weight.shape[1] - 1, BLOCK // max(1, rows * width))
    for begin in range(group.begin, group.end, size):
        yield begin, min(group.end, begin + size)


def _window(x: Inputs, state: Tensor, group: Group, begin: int, stop: int) -> Tensor:
    """Tokens begin to stop and the W - 1 inputs before, [rows, W - 1 + n, D]; state: before all."""
    if begin > group.begin:
        return x.input[group.rows, begin - x.weight.shape[1] + 1 : stop]
    return torch.cat((state[group.states], x.input[group.rows, begin:stop]), 1)


def _convolve(
    window: Tensor, columns: Tensor, bias: Tensor, silu: bool, output: Tensor | None = None
) -> Tensor:
    """[..., W - 1 + n, D] -> [..., n, D]. The order of the sum never varies: splits stay exact."""
    count = window.shape[-2] - len(columns) + 1
    output = torch.addcmul(bias, window[..., :count, :], columns[0], out=output)
    for j in range(1, len(columns)):
        output.addcmul_(window[..., j : j + count, :], columns[j])
    return F.silu(output, inplace=True) if silu else output


def _accumulate(
    d_sum: Tensor, window: Tensor, columns: Tensor, d_window: Tensor, sums: Tensor
) -> None:
    """Add the gradients of a window, of the columns and of the bias, given that of its sums."""
    count, width = d_sum.shape[-2:]
    product = torch.empty_like(d_sum)
    for j in range(len(columns)):
        d_window[..., j : j + count, :].addcmul_(d_sum, columns[j])
        torch.mul(d_sum, window[..., j : j + count, :], out=product)
        sums[j] += product.view(-1, width).sum(0)
    sums[-1] += d_sum.reshape(-1, width).sum(0)
