"""ELK's trust region: Newton's step, kept close to the last guess, computed by a Kalman smoother.

The step of Levenberg and Marquardt, argmin ½|r + J Δ|² + ½λ|Δ|², is the posterior mean of

    s_1 ~ N(f(s_0), 1)        s_t | s_{t−1} ~ N(A_t s_{t−1} + b_t, 1)        guess_t ~ N(s_t, 1/λ)

given all guesses, which is the mean of the smoother. The mean of the filter only uses the guesses
up to t. The published code uses the filter, which shrinks A by 1 / (1 + λ). (Gonzalez et al. 2024,
arXiv 2407.19115; parallel form after Särkkä & García-Fernández 2021.)
"""

import functools

import torch
from torch import Tensor

from supra.parallel.scan import Elements, Structure, affine_scan, associative_scan


def trust_region_step(
    structure: Structure, matrix: Tensor, bias: Tensor, guess: Tensor, damping: Tensor, smooth: bool
) -> Tensor:
    """The means [B, T, …] of the smoother, or of the filter.

    matrix: A_t; 0 at the first token.
    bias: b_t; f(s_0) at the first token.
    damping: λ > 0, of a shape that broadcasts to the states. Elements that A mixes have one λ.
    """
    form = _Channels() if structure is Structure.DIAGONAL else _Matrices()
    gain = damping / (1 + damping)
    wide = gain if structure is Structure.DIAGONAL else gain[..., None]
    news = guess - bias
    elements = (
        (1 - wide) * matrix,
        bias + gain * news,
        (1 - wide) * form.identity(bias),
        gain * form.apply(form.transpose(matrix), news),
        wide * form.compose(form.transpose(matrix), matrix),
    )
    _, mean, covariance, _, _ = associative_scan(functools.partial(_combine, form), elements)
    if not smooth:
        return mean
    later = matrix[:, 1:]
    ahead = form.compose(form.compose(later, covariance[:, :-1]), form.transpose(later))
    ahead = ahead + form.identity(bias[:, 1:])
    back = form.compose(covariance[:, :-1], form.transpose(later))
    back = form.divide(back, ahead)
    missed = form.apply(later, mean[:, :-1]) + bias[:, 1:]
    start = mean[:, :-1] - form.apply(back, missed)
    return affine_scan(
        structure,
        torch.cat([back, torch.zeros_like(matrix[:, :1])], dim=1),
        torch.cat([start, mean[:, -1:]], dim=1),
        reverse=True,
    )


class _Matrices:
    """Operations for states whose channels mix: A is [..., D, D]."""

    def identity(self, like: Tensor) -> Tensor:
        return Structure.DENSE.constant(1.0, like)

    def apply(self, matrix: Tensor, x: Tensor) -> Tensor:
        return (matrix @ x[..., None])[..., 0]

    def compose(self, second: Tensor, first: Tensor) -> Tensor:
        return second @ first

    def transpose(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def divide(self, x: Tensor, by: Tensor) -> Tensor:
        """x by⁻¹."""
        return torch.linalg.solve(by, x, left=False)


class _Channels:
    """Operations for states with independent channels: A has the shape of the state."""

    def identity(self, like: Tensor) -> Tensor:
        return torch.ones_like(like)

    def apply(self, matrix: Tensor, x: Tensor) -> Tensor:
        return matrix * x

    def compose(self, second: Tensor, first: Tensor) -> Tensor:
        return second * first

    def transpose(self, matrix: Tensor) -> Tensor:
        return matrix

    def divide(self, x: Tensor, by: Tensor) -> Tensor:
        return x / by


def _combine(form: _Matrices | _Channels, first: Elements, second: Elements) -> Elements:
    """Combine the filtering elements (A, b, C, η, J) of two adjacent intervals, the earlier one
    first."""
    a1, b1, c1, n1, j1 = first
    a2, b2, c2, n2, j2 = second
    through = form.divide(a2, form.identity(b1) + form.compose(c1, j2))  # A₂ (1 + C₁J₂)⁻¹
    back = form.divide(form.transpose(a1), form.identity(b1) + form.compose(j2, c1))
    return (
        form.compose(through, a1),
        form.apply(through, b1 + form.apply(c1, n2)) + b2,
        form.compose(form.compose(through, c1), form.transpose(a2)) + c2,
        form.apply(back, n2 - form.apply(j2, b1)) + n1,
        form.compose(form.compose(back, j2), a1) + j1,
    )
