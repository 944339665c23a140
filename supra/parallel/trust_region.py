"""How far ELK's next states may move from the last ones: one λ per token, from the residual.

Levenberg and Marquardt raise λ where a step raised the residual, and lower it where the step
lowered it. They judge all tokens together and take back a step that raised the residual. Here each
token is judged by itself, and no step is taken back: an error travels along the tokens before it
dies out, and until then no step lowers the residual of them all. A cell with two resting points
(NonlinearGated with |a| up to 2.4) stalled under that rule.
"""

import math

import torch
from torch import Tensor

from supra.errors import UserError, shown
from supra.parallel.kalman import trust_region_step
from supra.parallel.scan import Structure

START = 1e-4
FACTOR = 4.0
SMALLEST, LARGEST = 1e-8, 1e4  # variances are up to 1/λ, which float32 has to hold with room


def check_trust_region(value: float | str) -> None:
    """Raise UserError unless `value` is "auto" or a finite number > 0."""
    if value == "auto":
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise UserError(
            f"trust_region (={shown(value)}) must be 'auto', or a finite number > 0; for none, use "
            "deer or quasi_deer"
        )


class TrustRegion:
    """The steps of ELK, and their λ.

    Elements of a state that the cell does not mix are recurrences of their own, with a λ each. So
    neither another channel nor another row of the batch changes a solution.

    structure: of the cell's Jacobian.
    value: "auto", or λ for all tokens and sweeps.
    tolerance: tokens are solved up to the first whose residual is larger. Solved states stay, and
        the next one follows from them. So n sweeps solve n tokens or more, whatever λ is.
    """

    def __init__(self, structure: Structure, value: float | str, tolerance: float, smooth: bool):
        self.structure, self.adapts = structure, value == "auto"
        self.start = START if self.adapts else value
        self.tolerance, self.smooth = tolerance, smooth
        self.error = self.damping = None  # [B, T, …], 1 in place of elements that mix

    def step(
        self, form: Structure, matrix: Tensor, bias: Tensor, states: Tensor, value: Tensor
    ) -> Tensor:
        """The next states, from the linear recurrence of (matrix, bias) in `form`, which is the
        cell's structure or its diagonal. value: f at the states so far."""
        self._judge(states, value)
        solved = (self.error <= self.tolerance).cumprod(1).bool()
        known = torch.cat([torch.ones_like(solved[:, :1]), solved[:, :-1]], dim=1)
        target = torch.where(solved, states, value)
        wide = known if form is Structure.DIAGONAL else known[..., None]
        moved = trust_region_step(
            form,
            torch.where(wide, 0, matrix),
            torch.where(known, target, bias),
            torch.where(known, target, states),
            self.damping,
            self.smooth,
        )
        return torch.where(known, target, moved)

    def _judge(self, states: Tensor, value: Tensor) -> None:
        """Measure the error of each token, and choose λ by whether the last step lowered it."""
        largest = self.structure.largest
        error = largest(states - value) / largest(states).clamp(min=1)
        if self.damping is None:
            self.damping = torch.full_like(error, self.start)
        elif self.adapts:
            fell = error <= self.error.clamp(min=self.tolerance)
            damping = torch.where(fell, self.damping / FACTOR, self.damping * FACTOR)
            self.damping = damping.clamp(SMALLEST, LARGEST)
        self.error = error
