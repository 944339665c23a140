"""All states of a nonlinear recurrence at once, as the root of s_t − f(s_{t−1}, x_t) = 0.

    s_t ← f(ŝ_{t−1}) + A_t (s_{t−1} − ŝ_{t−1})        ŝ the guess so far, s the next one

is a linear recurrence, which a scan solves. A_t is the Jacobian of f at ŝ_{t−1} (DEER, Newton's
method; Lim et al. 2023, arXiv 2309.12252), its diagonal (quasi-DEER; Gonzalez et al. 2024, arXiv
2407.19115), one (Picard) or zero (Jacobi). ELK and quasi-ELK keep the steps of DEER and quasi-DEER
close to the guess. The first i states are exact after i sweeps, whatever A is.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from supra.errors import UserError, check_choice, check_whole
from supra.parallel.cells import Cell, Drive
from supra.parallel.scan import Structure, affine_scan
from supra.parallel.trust_region import TrustRegion, check_trust_region

METHODS = ("sequential", "deer", "quasi_deer", "elk", "quasi_elk", "picard", "jacobi")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}  # for the residual / the largest state
LARGEST = 1e8  # larger elements of a state are about to overflow, and are reset


class NotConverged(RuntimeError):
    """The sweeps did not reach the tolerance, and the caller chose otherwise="raise"."""


@dataclass(frozen=True)
class Solution:
    """States [B, T, …] and how they were found.

    residual: the largest |s_t − f(s_{t−1})| of a row, divided by the row's largest |s_t| or by one,
        whichever is larger; and of the rows the largest.
    resets: the number of elements that overflowed and were reset, over all sweeps.
    converged: whether `method` reached the tolerance.
    fell_back: whether it did not, and a loop over the tokens gave the states. The other fields then
        describe the failed attempt.
    """

    states: Tensor
    method: str
    iterations: int
    residual: float
    resets: int
    converged: bool
    fell_back: bool = False


def solve(
    cell: Cell,
    inputs: Tensor | tuple[Tensor, ...],
    initial_state: Tensor | None = None,
    method: str = "auto",
    *,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    guess: Tensor | str = "auto",
    trust_region: float | str = "auto",
    estimate: str = "filter",
    diagonal: str = "exact",
    probes: int = 4,
    seed: int = 0,
    otherwise: str = "sequential",
) -> Solution:
    """Run `cell` over all tokens.

    Args:
        inputs: the arguments of cell.project, [B, T, …] with B, T >= 1.
        initial_state: [B, …], with the shape of the cell's empty state, which None stands for.
        method: one of METHODS, or "auto": see `choose_method`.
        tolerance: maximum residual, >= 0; None means 1e-12 in float64 and 2e-6 in float32.
        max_iterations: maximum number of sweeps, >= 1; None means T, which is enough for all
            methods.
        guess: the first guess: states [B, T, …], "zeros", "linear" (the solution of the cell's
            linear part), or "auto", which is "linear" if the cell has a linear part.
        trust_region: λ > 0 of ELK; with small values ELK approaches DEER. "auto" raises λ at tokens
            whose residual a sweep raised, and lowers it at the others.
        estimate: for ELK: "filter"; or "smoother", the step of Levenberg and Marquardt, which costs
            more and often needs more sweeps.
        diagonal: for quasi methods on dense cells: "exact"; or "stochastic", the mean of z ∘ Jz
            over `probes` random sign vectors z, without the full Jacobian (Hutchinson).
        seed: seed of the random signs.
        otherwise: what to do if the sweeps do not converge: "sequential" warns and runs a loop over
            the tokens; "raise" raises NotConverged.

    Gradients flow to the inputs, the initial state and the cell's parameters. For every method they
    come from the adjoint recurrence with the true Jacobians at the solution, and they are as exact
    as the states. Only method="sequential" has second derivatives; the other methods raise.

    Raises:
        UserError: an unknown name, a number out of range or a shape that does not fit.
        NotConverged: the sweeps did not converge, with otherwise="raise".
    """
    check_choice("estimate", estimate, ("smoother", "filter"))
    check_choice("diagonal", diagonal, ("exact", "stochastic"))
    check_choice("otherwise", otherwise, ("sequential", "raise"))
    check_choice("method", method, ("auto", *METHODS))
    check_trust_region(trust_region)
    drive = cell.project(inputs)
    start = _check(cell, drive, initial_state, guess, tolerance, max_iterations, probes)
    tokens = drive[0].shape[1]
    if method == "auto":
        method = choose_method(cell, start, tokens)
    if method == "sequential":
        return Solution(_loop(cell, drive, start), method, tokens, 0.0, 0, True)
    if tolerance is None:
        tolerance = TOLERANCES.get(start.dtype, TOLERANCES[torch.float32])
    region = None
    if method in ("elk", "quasi_elk"):
        smooth = estimate == "smoother"
        region = TrustRegion(cell.structure, trust_region, tolerance, smooth)
    sweeps = _Sweeps(cell, drive, start, method, diagonal, probes, seed, region)
    found = sweeps.run(guess, tolerance, max_iterations or tokens)
    if not found.converged:
        message = (
            f"{method} left a residual of {found.residual:.1e} after {found.iterations} sweeps "
            f"over {tokens} tokens ({found.resets} resets)"
        )
        if otherwise == "raise":
            raise NotConverged(f"{message}: use method='sequential' or 'elk', or more sweeps")
        warnings.warn(f"{message}: a loop over the tokens takes over", stacklevel=2)
        states = _loop(cell, drive, start)
        return Solution(states, **_numbers(found), fell_back=True)
    states = _differentiable(cell, drive, start, found.states)
    return Solution(states, **_numbers(found))


FEW_TOKENS = {Structure.DIAGONAL: 128, Structure.BLOCK: 128, Structure.DENSE: 256}


def choose_method(cell: Cell, state: Tensor, tokens: int) -> str:
    """The method that "auto" stands for.

    It is "deer" if the cell contracts and a scan costs less than the many small steps of a loop: on
    a CPU up to `cell.few_numbers` elements in `state`, on a GPU also for all cells whose Jacobians
    are not dense. Otherwise it is "sequential".
    """
    few = state.numel() <= cell.few_numbers or (
        state.device.type != "cpu" and cell.structure is not Structure.DENSE
    )
    long = tokens >= FEW_TOKENS[cell.structure]
    return "deer" if few and long and cell.contracts() else "sequential"


def _check(
    cell: Cell,
    drive: Drive,
    state: Tensor | None,
    guess: Tensor | str,
    tolerance: float | None,
    max_iterations: int | None,
    probes: int,
) -> Tensor:
    """Check the arguments and return the initial state. All arguments are checked whatever the
    method is, because "auto" may choose another method next time."""
    rows = drive[0].shape[:2]
    if 0 in rows:
        raise UserError(f"inputs (B, T = {[*rows]}) must have at least one row and one token")
    empty = cell.empty_state(drive)
    if state is not None and state.shape != empty.shape:
        raise UserError(
            f"initial_state (shape {[*state.shape]}) must have shape {[*empty.shape]}, or be None"
        )
    wanted = [*rows, *empty.shape[1:]]
    if isinstance(guess, Tensor):
        if [*guess.shape] != wanted:
            raise UserError(
                f"guess (shape {[*guess.shape]}) must have shape {wanted}, or be a name"
            )
    else:
        check_choice("guess", guess, ("auto", "zeros", "linear"))
        if guess == "linear" and not hasattr(cell, "linear_solution"):
            raise UserError(
                f"guess (='linear') does not fit: {type(cell).__name__} has no linear part; use "
                "'auto' or 'zeros'"
            )
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(f"tolerance (={tolerance}) must be >= 0 and finite, or None")
    if max_iterations is not None:
        check_whole("max_iterations", max_iterations, 1)
    check_whole("probes", probes, 1)
    return empty if state is None else state


def _numbers(found: Solution) -> dict:
    names = ("method", "iterations", "residual", "resets", "converged")
    return {name: getattr(found, name) for name in names}


def _loop(cell: Cell, drive: Drive, state: Tensor) -> Tensor:
    states = []
    for t in range(drive[0].shape[1]):
        state = cell.step(state, tuple(x[:, t] for x in drive))
        states.append(state)
    return torch.stack(states, dim=1)


class _Sweeps:
    """The iteration, without gradients."""

    def __init__(
        self,
        cell: Cell,
        drive: Drive,
        start: Tensor,
        method: str,
        diagonal: str = "exact",
        probes: int = 1,
        seed: int = 0,
        trust_region: TrustRegion | None = None,
    ):
        self.cell, self.method = cell, method
        self.drive = tuple(x.detach() for x in drive)
        self.start = start.detach()
        self.trust_region = trust_region
        full = method in ("deer", "elk")
        self.structure = cell.structure if full else Structure.DIAGONAL
        self.probes = probes if diagonal == "stochastic" and not full else 0
        self.generator = torch.Generator(self.start.device).manual_seed(seed)

    @torch.no_grad()
    def run(self, guess: Tensor | str, tolerance: float, max_iterations: int) -> Solution:
        """Sweep until all rows meet the tolerance. A row that meets it stays as it is, so that its
        states do not depend on the other rows."""
        states = begin = self._first(guess)
        resets = 0
        for iteration in range(max_iterations + 1):
            before = torch.cat([self.start[:, None], states[:, :-1]], dim=1)
            value, matrix = self._linearise(before)
            over = tuple(range(1, states.dim()))
            size = states.abs().amax(over, keepdim=True).clamp(min=1)
            residuals = (states - value).abs().amax(over, keepdim=True) / size
            residual = residuals.amax().item()
            if residual <= tolerance or iteration == max_iterations:
                break
            following = self._step(states, before, value, matrix)
            lost = ~(following.abs() <= LARGEST)  # also true for NaN
            resets += int(lost.sum())
            following = torch.where(lost, begin, following)
            states = torch.where(residuals <= tolerance, states, following)
        return Solution(states, self.method, iteration, residual, resets, residual <= tolerance)

    def _first(self, guess: Tensor | str) -> Tensor:
        """The first guess."""
        linear = getattr(self.cell, "linear_solution", None)
        if isinstance(guess, Tensor):
            return guess.detach()
        if linear is None or guess == "zeros":
            return self.start[:, None].expand(-1, self.drive[0].shape[1], *self.start.shape[1:]) * 0
        return affine_scan(Structure.DIAGONAL, *linear(self.drive), self.start)

    def _linearise(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """f and A at the previous states."""
        cell = self.cell
        if self.method in ("picard", "jacobi"):
            value = on_all_tokens(cell.step, before, self.drive)
            return value, torch.full_like(value, float(self.method == "picard"))
        if self.probes:
            return self._estimated(before)
        value, matrix = on_all_tokens(cell.linearise, before, self.drive)
        return value, matrix if self.structure is cell.structure else cell.structure.diagonal(
            matrix
        )

    def _estimated(self, before: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(before)
        for _ in range(self.probes):
            signs = torch.randint(2, before.shape, generator=self.generator, device=before.device)
            signs = (2 * signs - 1).to(before.dtype)
            value, moved = on_all_tokens(
                lambda x, drive: self.cell.jacobian_product(x, drive[:-1], drive[-1]),
                before,
                (*self.drive, signs),
            )
            total += signs * moved
        return value, total / self.probes

    def _step(self, states: Tensor, before: Tensor, value: Tensor, matrix: Tensor) -> Tensor:
        bias = value - self.structure.apply(matrix, before)
        if self.trust_region is None:
            return affine_scan(self.structure, matrix, bias, self.start)
        return self.trust_region.step(self.structure, matrix, bias, states, value)


def on_all_tokens(function: Callable, state: Tensor, drive: Drive):
    """Apply a cell's function to all tokens of all rows; results are [B, T, …]."""
    shape = state.shape[:2]
    found = function(state.flatten(0, 1), tuple(x.flatten(0, 1) for x in drive))
    if isinstance(found, Tensor):
        return found.unflatten(0, shape)
    return tuple(x.unflatten(0, shape) for x in found)


def _differentiable(cell: Cell, drive: Drive, start: Tensor, states: Tensor) -> Tensor:
    """The solution with its gradient: one more step from each state to the next. autograd records
    these steps, and `_Adjoint` adds how each state depends on the previous one."""
    if not torch.is_grad_enabled():
        return states
    before = torch.cat([start[:, None], states[:, :-1]], dim=1)
    following = on_all_tokens(cell.step, before, drive)
    if not following.requires_grad:
        return states
    detached = before.detach(), *(x.detach() for x in drive)
    return _Adjoint.apply(following, cell, *detached)


class _Adjoint(torch.autograd.Function):
    """The identity on s_t = f(s_{t−1}), whose gradient is g_t = ∂L/∂s_t + A_{t+1}ᵀ g_{t+1}."""

    @staticmethod
    def forward(ctx, states: Tensor, cell: Cell, before: Tensor, *drive: Tensor) -> Tensor:
        ctx.cell = cell
        ctx.save_for_backward(before, *drive)
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if torch.is_grad_enabled():  # only with create_graph=True
            raise RuntimeError("second derivatives of solve() need method='sequential'")
        before, *drive = ctx.saved_tensors
        structure = ctx.cell.structure
        _, matrix = on_all_tokens(ctx.cell.linearise, before, tuple(drive))
        later = torch.cat([matrix[:, 1:], torch.zeros_like(matrix[:, :1])], dim=1)
        total = affine_scan(structure, structure.transpose(later), gradient, reverse=True)
        return (total, None, None, *[None] * len(drive))
