"""Causal convolution with any kernel, by Fourier transforms of blocks of tokens.

A block's convolution is longer than the block by the kernel: its first part is output, and the
rest, the tail, is added to what later blocks give. The tail is the state. Transforms are long
enough for nothing to wrap around.

Legend: columns [H, D, T], time innermost; L taps in a kernel.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.long_conv.inputs import FftInputs

MIN_BLOCK = 1024  # tokens: a block as short as a short kernel would be all calls
WORK = 1 << 20  # numbers that are transformed at once: 4 MiB in float32


def forward(x: FftInputs) -> tuple[Tensor, Tensor]:
    """Output and final state."""
    input, kernel, rest = x.input, x.kernel, x.kernel.shape[1] - 1
    end = checks.given_or_zeros(x.state, x).clone()
    output = input.new_empty(input.shape)
    block, length = _sizes(x)
    for heads in _slices(input, length):
        spectrum = torch.fft.rfft(kernel[heads], length)[:, None]
        for n, row, begin, stop in _spans(x):
            tail = _columns(end[n, :, heads], kernel)
            for at in range(begin, stop, block):
                tokens = slice(at, min(at + block, stop))
                columns = _columns(input[row, tokens, heads], kernel)
                found = torch.fft.irfft(torch.fft.rfft(columns, length) * spectrum, length)
                found[..., :rest] += tail
                count = columns.shape[2]
                output[row, tokens, heads] = found[..., :count].permute(2, 0, 1)
                tail = found[..., count : count + rest]
            end[n, :, heads] = tail.permute(2, 0, 1)
    return output, end


def backward(
    x: FftInputs, d_output: Tensor, d_end: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of input, kernel and state.

    An output is the sum of what is input up to L - 1 tokens before it, so the gradient of a block
    of inputs is the correlation of the kernel with the gradients of outputs up to L - 1 tokens
    after it; the final state is the outputs after the last.
    """
    input, kernel, rest = x.input, x.kernel, x.kernel.shape[1] - 1
    d_input, d_kernel = input.new_empty(input.shape), torch.empty_like(kernel)
    d_end = checks.given_or_zeros(d_end, x)
    d_state = torch.empty_like(d_end)
    block, length = _sizes(x)
    for heads in _slices(input, length):
        spectrum = torch.fft.rfft(kernel[heads], length).conj_physical()[:, None]
        d_spectrum = torch.zeros_like(spectrum)
        for n, row, begin, stop in _spans(x):
            later = _Later(d_output[row, begin:stop, heads], d_end[n, :, heads])
            for at in range(begin, stop, block):
                tokens = slice(at, min(at + block, stop))
                given = later[at - begin : tokens.stop - begin + rest]
                given = torch.fft.rfft(_columns(given, kernel), length)
                columns = _columns(input[row, tokens, heads], kernel)
                d_columns = torch.fft.irfft(given * spectrum, length)[..., : columns.shape[2]]
                d_input[row, tokens, heads] = d_columns.permute(2, 0, 1)
                products = torch.fft.rfft(columns, length).conj_physical() * given
                d_spectrum += products.sum(1, keepdim=True)
            d_state[n, :, heads] = later[:rest]
        d_kernel[heads] = torch.fft.irfft(d_spectrum[:, 0], length)[:, : rest + 1]
    return d_input, d_kernel, None if x.state is None else d_state


class _Later:
    """Two tensors [T, H, D], one after the other, to take parts from."""

    def __init__(self, first: Tensor, second: Tensor):
        self.first, self.second = first, second

    def __getitem__(self, part: slice) -> Tensor:
        begin, end, length = part.start or 0, part.stop, len(self.first)
        first, second = (
            self.first[begin:end],
            self.second[max(0, begin - length) : max(0, end - length)],
        )
        return torch.cat((first.to(second.dtype), second))


def _sizes(x: FftInputs) -> tuple[int, int]:
    """Tokens of a block, and of its transform: a power of two that holds block and tail."""
    taps = x.kernel.shape[1]
    block = min(x.block_size or max(taps, MIN_BLOCK), x.input.shape[1])
    length = 1 << (block + taps - 2).bit_length()
    return (block if x.block_size else length - taps + 1), length


def _slices(input: Tensor, length: int) -> Iterator[slice]:
    """Heads that are transformed at once."""
    heads, width = input.shape[2:]
    step = max(1, WORK // (length * width))
    return (slice(at, min(at + step, heads)) for at in range(0, heads, step))


def _spans(x: FftInputs) -> Iterator[tuple[int, int, int, int]]:
    """Sequence, its row, first token and end."""
    batch, length = x.input.shape[:2]
    if x.cu_seqlens is None:
        return ((n, n, 0, length) for n in range(batch))
    bounds = checks.bounds(x.cu_seqlens, batch, length)
    return ((n, 0, *span) for n, span in enumerate(pairwise(bounds)))


def _columns(x: Tensor, kernel: Tensor) -> Tensor:
    """[T, H, D] -> [H, D, T]"""
    return x.to(kernel.dtype).permute(1, 2, 0).contiguous()
