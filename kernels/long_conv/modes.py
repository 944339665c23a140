"""What a chunk needs of the state-space model: a few small matrices made of powers of its modes.

A head has M complex modes a_m with weights c_m. For chunks of n tokens, 0 <= i < n:

    taps[i]  = 2 Re sum_m c_m a_m^i     what an input adds to the output i tokens later
    read[i]  = 2 conj(c a^(i + 1))      output of token i = sum over m, re and im of read * state
    write[i] = a^(n - 1 - i)            what the input of token i adds to the state after the chunk

Complex numbers come as pairs in a last dimension of 2. The skip connection is a part of taps[0].
Conjugates are made on the spot: the lazy ones of torch lose their flag in an op that it compiles.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels.checks import LOWEST_LOG_DECAY

# products with denormal numbers take 200 times as long; below this a power is lost in any sum, and
# products of two above it are no denormals
LOWEST = math.log(1e-19)


class Model(NamedTuple):
    """log_decay and frequency [H, M], weight [H, M, 2] and skip [H] or None, of one dtype."""

    log_decay: Tensor
    frequency: Tensor
    weight: Tensor
    skip: Tensor | None


class Matrices(NamedTuple):
    """For chunks of n tokens. Of a shorter one they are the first rows, of write the last."""

    taps: Tensor  # [H, n]
    read: Tensor  # [H, n, M, 2]
    write: Tensor  # [H, n, M, 2]


def matrices(model: Model, size: int) -> Matrices:
    tables = _Tables.of(model, size)
    read = tables.conjugates(2 * (_weight(model) * tables.mode).conj_physical())
    write = _products(tables.high.flip(1), tables.low.flip(1))[:, -size:]
    taps = tables.taps(model)[:, :size]
    return Matrices(taps, torch.view_as_real(read[:, :size]), torch.view_as_real(write))


def d_model(model: Model, found: Matrices, whole: Iterable[tuple[int | Tensor, Tensor]]) -> Model:
    """Gradients of the model from those of its matrices and of transition(model, n), with n."""
    size = found.taps.shape[1]
    tables = _Tables.of(model, size)
    counts = torch.arange(size, device=found.taps.device)
    moments = torch.stack((torch.ones_like(counts), counts)).to(found.taps.dtype)

    def sums(powers: Tensor, gradient: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Over the products with every power, plain and times its exponent."""
        products = torch.view_as_real(powers * torch.view_as_complex(gradient)).flatten(2)
        return torch.view_as_complex((moments @ products).unflatten(2, (-1, 2))).unbind(1)

    powers = _products(tables.high, tables.low)[:, :size]
    by_taps = (2 * found.taps[:, None] * moments) @ torch.view_as_real(powers).flatten(2)
    by_taps = torch.view_as_complex(by_taps.unflatten(2, (-1, 2)))
    read, read_moment = sums(powers, found.read, moments)
    read, read_moment = 2 * tables.mode * read, 2 * tables.mode * (read + read_moment)
    weighted = (by_taps + torch.stack((read, read_moment), 1)).conj_physical()
    backward = _products(tables.high.conj_physical().flip(1), tables.low.conj_physical().flip(1))
    _, write_moment = sums(backward[:, -size:], found.write, moments.flip(1))
    d_logs = _weight(model).conj_physical() * weighted[:, 1] + write_moment
    for count, x in whole:
        moment = count * transition(model, count).conj_physical() * x
        d_logs = d_logs + moment.sum_to_size(d_logs.shape)
    lost = model.log_decay < LOWEST_LOG_DECAY
    return Model(
        d_logs.real.to(found.taps.dtype).masked_fill(lost, 0),
        d_logs.imag.to(found.taps.dtype),
        torch.view_as_real(weighted[:, 0]),
        None if model.skip is None else found.taps[:, 0].clone(),
    )


def transition(model: Model, count: int | Tensor) -> Tensor:
    """a^count [..., H, M], complex, in float64: the state is multiplied by it again and again.

    In float32 its error would grow with their number, to 3e-5 over 4,096 tokens of a mode that
    hardly decays.
    """
    return torch.polar(*polar(model, count))


def polar(model: Model, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """Sizes and angles of the complex numbers a^count that `transition` returns."""
    logs = wide(model.log_decay).clamp(min=LOWEST_LOG_DECAY) * count
    return torch.where(logs > LOWEST, logs.exp(), 0), wide(model.frequency) * count


def toeplitz(taps: Tensor) -> Tensor:
    """[H, n] -> [H, n, n], taps[i - j] at row j and column i, zero before."""
    size = taps.shape[1]
    return F.pad(taps, (size - 1, 0)).unfold(1, size, 1).flip(1)


def d_toeplitz(gradient: Tensor) -> Tensor:
    """Sums along the diagonals of [H, n, n] -> [H, n]."""
    heads, size, _ = gradient.shape
    skewed = F.pad(gradient.flip(1), (0, size)).flatten(1)[:, :-size]
    return skewed.view(heads, size, 2 * size - 1).sum(1)[:, size - 1 :]


def wide(x: Tensor) -> Tensor:
    """In float64, where there is one."""
    return x if x.device.type == "mps" else x.double()


class _Tables(NamedTuple):
    """Powers a^i for i in a row, as products of two short tables, complex."""

    mode: Tensor  # a [H, M]
    high: Tensor  # a^(s i) [H, s, M], 0 <= i < s
    low: Tensor  # a^i [H, s, M]

    @staticmethod
    def of(model: Model, size: int) -> "_Tables":
        step = math.isqrt(size - 1) + 1
        counts = torch.arange(step, device=model.log_decay.device)
        mode, dtype = transition(model, 1), model.weight.dtype.to_complex()
        low, high = _ladder(mode, step), _ladder(transition(model, step), step)

        logs = model.log_decay.clamp(min=LOWEST_LOG_DECAY)[:, None]

        def table(powers: list[Tensor], counts: Tensor) -> Tensor:
            seen = logs * counts[:, None] > LOWEST
            return torch.where(seen, torch.stack(powers, 1).to(dtype), 0)

        return _Tables(mode.to(dtype), table(high, counts * step), table(low, counts))

    def conjugates(self, by: Tensor | None = None) -> Tensor:
        """conj(a^i) [H, s * s, M], times by [H, M]."""
        low = self.low.conj_physical()
        return _products(self.high.conj_physical(), low if by is None else low * by[:, None])

    def taps(self, model: Model) -> Tensor:
        """[H, s * s]"""
        low = (self.low * 2 * _weight(model)[:, None]).conj_physical()
        high, low = (torch.view_as_real(x).flatten(2) for x in (self.high, low))
        taps = (high @ low.mT).flatten(1)
        if model.skip is not None:
            taps = torch.cat((taps[:, :1] + model.skip[:, None], taps[:, 1:]), 1)
        return taps


def _ladder(base: Tensor, count: int) -> list[Tensor]:
    """base^i for 0 <= i < count."""
    found = [torch.ones_like(base), base]
    for i in range(2, count):
        found.append(found[i // 2] * found[i - i // 2])
    return found[:count]


def _products(high: Tensor, low: Tensor) -> Tensor:
    return (high[:, :, None] * low[:, None]).flatten(1, 2)


def _weight(model: Model) -> Tensor:
    return torch.view_as_complex(model.weight.contiguous())
