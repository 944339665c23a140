"""What ranks exchange that each have a part of the same rows, forward and backward.

Notation: R ranks, B rows, H heads. All ranks must call a function here, and all must call backward
through what it returned, since gradients are exchanged then.
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The ranks of a process group, in the order of their parts.

    `bytes` counts what this rank has received from the others, and `seconds` how long it has waited
    for them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        """group: None for all ranks."""
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes = 0
        self._waited: list[tuple[Mark, Mark]] = []

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank: [R, …]. Without gradients."""
        found = x.new_empty(self.size, *x.shape)
        self._exchange(lambda: dist.all_gather([*found], x.contiguous(), group=self.group), x)
        return found

    def sum_of_own(self, x: Tensor) -> Tensor:
        """From x [R, …] of every rank, the sum of all x[r] on rank r. Without gradients."""
        found, parts = x.new_empty(x.shape[1:]), [*x.contiguous()]
        self._exchange(lambda: dist.reduce_scatter(found, parts, group=self.group), found)
        return found

    def _exchange(self, act: Callable[[], None], x: Tensor) -> None:
        """Let the ranks act, and count x from each of the others."""
        begin = _mark(x.device)
        act()
        self._waited.append((begin, _mark(x.device)))
        self.bytes += (self.size - 1) * x.nbytes

    @property
    def seconds(self) -> float:
        return sum(_seconds(*marks) for marks in self._waited)


Mark = float | torch.cuda.Event


def _mark(device: torch.device) -> Mark:
    """Now, by the clock of the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(end, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def gather(x: Tensor, ranks: Ranks) -> Tensor:
    """x of every rank: [R, …]."""
    return _Gather.apply(x, ranks)


def sum_of_own(x: Tensor, ranks: Ranks) -> Tensor:
    """From x [R, …] of every rank, the sum of all x[r] on rank r."""
    return _SumOfOwn.apply(x, ranks)


def state_before(transition: Tensor, state: Tensor, ranks: Ranks) -> Tensor:
    """The state before the tokens of this rank, from what the tokens of each rank do to a state.

    They change S to A S + b. transition: A [B, H, K, K], or [B, H, K or 1, 1] for a factor per row
    of S. state: b [B, H, K, V], the state after them from an empty one.
    """
    return _StateBefore.apply(transition, state, ranks)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return ranks.gather(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.ranks.sum_of_own(gradient), None


class _SumOfOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return ranks.sum_of_own(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.ranks.gather(gradient), None


class _StateBefore(torch.autograd.Function):
    """Forward, S ← A S + b over the ranks before this one. Backward, gradients pass the ranks
    behind it in the same way: G ← Aᵀ G + g from the last rank on, where g is the gradient of the
    state before a rank."""

    @staticmethod
    def forward(ctx, transition, state, ranks):
        pairs = ranks.gather(torch.cat([transition.flatten(), state.flatten()]))
        transitions, states = pairs.split([transition.numel(), state.numel()], dim=1)
        transitions, states = transitions.view(-1, *transition.shape), states.view(-1, *state.shape)
        before = torch.zeros_like(states[0])
        for a, b in zip(transitions[: ranks.rank], states, strict=False):
            before = _applied(a, before) + b
        ctx.ranks = ranks
        ctx.save_for_backward(transitions[ranks.rank + 1 :].clone(), before)
        ctx.sizes = transition.shape
        return before

    @staticmethod
    def backward(ctx, gradient):
        (transitions, before), ranks = ctx.saved_tensors, ctx.ranks
        gradients = ranks.gather(gradient)[ranks.rank + 1 :]
        after = torch.zeros_like(before)
        for a, g in zip(transitions.flip(0), gradients.flip(0), strict=True):
            after = _applied(a.mT if _is_matrix(a) else a, after) + g
        if _is_matrix(transitions):
            return after @ before.mT, after, None
        return (after * before).sum_to_size(ctx.sizes), after, None


def _applied(transition: Tensor, state: Tensor) -> Tensor:
    return transition @ state if _is_matrix(transition) else transition * state


def _is_matrix(transition: Tensor) -> bool:
    """Whether it is no factor per row, which a matrix of a single row would be, too."""
    return transition.shape[-1] > 1
