"""The causal convolution in plain torch, for any device.

All sequences are one list of rows [R, D], convolved as if it were one sequence. Then the heads, the
first W - 1 tokens of every sequence, are done again with the state that truly precedes them, all
sequences at once. A window is rows with the W - 1 rows before them in front.

The rows go in blocks that stay in a core's cache. On a CPU, 2048 tokens of 512 channels with 4 taps
take three quarters of the time that they do in one block, and a third of that of conv1d with its
transposed copies.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels import checks
from supra.kernels.causal_conv.inputs import Inputs

BLOCK = 128 * 1024  # values, 512 KiB as float32


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and final state."""
    columns, bias = _parameters(x)
    rows = x.input.reshape(-1, x.input.shape[2])
    output = rows.new_empty(rows.shape)
    for begin, end in _blocks(rows):
        block = output[begin:end]
        same = block if block.dtype == columns.dtype else None
        found = _convolve(_window(rows, begin, end, columns), columns, bias, x.silu, same)
        if same is None:
            block.copy_(found)
    heads = _Heads.of(rows, x)
    found = _convolve(heads.windows.to(columns.dtype), columns, bias, x.silu)
    output[heads.rows] = found[heads.valid].to(output.dtype)
    return output.view(x.input.shape), heads.end(rows)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; the sums before silu are computed again."""
    columns, bias = _parameters(x)
    rows, d_output = (y.reshape(-1, y.shape[2]) for y in (x.input, d_output.contiguous()))
    heads = _Heads.of(rows, x)
    past = len(columns) - 1
    body = columns.new_ones(len(rows), 1)
    body[heads.rows] = 0

    d_rows = columns.new_zeros(past + len(rows), columns.shape[1])
    sums = columns.new_zeros(past + 2, columns.shape[1])  # of the columns, then of the bias
    for begin, end in _blocks(rows):
        window = _window(rows, begin, end, columns)
        d_sum = _d_sum(d_output[begin:end] * body[begin:end], window, columns, bias, x.silu)
        _accumulate(d_sum, window, columns, d_rows[begin : past + end], sums)
    d_rows = d_rows[past:]

    window = heads.windows.to(columns.dtype)
    d_heads = window.new_zeros(*heads.valid.shape, window.shape[2])
    d_heads[heads.valid] = d_output[heads.rows].to(columns.dtype)
    d_window = torch.zeros_like(window)
    _accumulate(_d_sum(d_heads, window, columns, bias, x.silu), window, columns, d_window, sums)
    d_rows[heads.rows] += d_window[:, past:][heads.valid]
    d_state = d_window[:, :past].contiguous()
    if d_end is not None:
        heads.d_end(d_end.to(columns.dtype), d_rows, d_state)
    return (
        d_rows.to(x.input.dtype).view(x.input.shape),
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


def _blocks(rows: Tensor) -> Iterator[tuple[int, int]]:
    size = max(1, BLOCK // max(1, rows.shape[1]))
    for begin in range(0, len(rows), size):
        yield begin, min(len(rows), begin + size)


def _window(rows: Tensor, begin: int, end: int, columns: Tensor) -> Tensor:
    """Rows begin to end and the W - 1 before, zeros before the first."""
    first = begin - len(columns) + 1
    window = rows[max(0, first) : end].to(columns.dtype)
    return F.pad(window, (0, 0, -first, 0)) if first < 0 else window


def _convolve(
    window: Tensor, columns: Tensor, bias: Tensor, silu: bool, output: Tensor | None = None
) -> Tensor:
    """[..., W - 1 + n, D] -> [..., n, D]. The order of the sum never varies: splits stay exact."""
    count = window.shape[-2] - len(columns) + 1
    output = torch.addcmul(bias, window[..., :count, :], columns[0], out=output)
    for j in range(1, len(columns)):
        output.addcmul_(window[..., j : j + count, :], columns[j])
    return F.silu(output, inplace=True) if silu else output


def _d_sum(d_output: Tensor, window: Tensor, columns: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """Gradient of the sum before the activation."""
    if not silu:
        return d_output
    return torch.ops.aten.silu_backward(d_output, _convolve(window, columns, bias, False))


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


class _Heads(NamedTuple):
    """The first W - 1 tokens of N sequences, each sequence with its state in front."""

    state: Tensor  # [N, W - 1, D]
    windows: Tensor  # [N, 2 (W - 1), D]: state, then head; any token where the sequence is shorter
    valid: Tensor  # [N, W - 1]: the sequence is that long
    rows: Tensor  # places of the valid tokens in the rows
    tail: Tensor  # [N, W - 1]: the last W - 1 places in the rows, those of the state too
    old: Tensor  # [N, W - 1]: that place precedes the first token
    old_place: Tensor  # [N, W - 1]: where in the state it is then

    @staticmethod
    def of(rows: Tensor, x: Inputs) -> "_Heads":
        state, taps = checks.given_or_zeros(x.state, x), x.weight.shape[1]
        bounds = checks.bounds(x.cu_seqlens, *x.input.shape[:2])
        bound = torch.tensor(bounds, device=rows.device)
        begin, end = bound[:-1, None], bound[1:, None]
        offset = torch.arange(taps - 1, device=rows.device)
        places, tail = begin + offset, end - taps + 1 + offset
        valid, old = places < end, tail < begin
        windows = torch.cat((state, rows[places.clamp(max=len(rows) - 1)]), 1)
        old_place = (end - begin + offset).clamp(max=taps - 2)
        return _Heads(state, windows, valid, places[valid], tail, old, old_place)

    def end(self, rows: Tensor) -> Tensor:
        """The final state."""
        before = self.state.gather(1, self._across(rows))
        return torch.where(self.old[..., None], before, rows[self.tail.clamp(min=0)])

    def d_end(self, d_end: Tensor, d_rows: Tensor, d_state: Tensor) -> None:
        """Add the gradient of the final state to what it is a copy of."""
        d_rows[self.tail[~self.old]] += d_end[~self.old]
        d_state.scatter_add_(1, self._across(d_rows), d_end * self.old[..., None])

    def _across(self, rows: Tensor) -> Tensor:
        return self.old_place[..., None].expand(-1, -1, rows.shape[1])
