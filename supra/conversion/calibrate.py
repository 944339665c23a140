"""Starting values from the teacher's own attention, before any training step.

One pass over some text shows every mixer its teacher's inputs, and what softmax attention made of
them; see `supra.model.original`. A mixer chooses its own starting values (`Mixer.calibrate`). What
it cannot reach, the output projection behind it can: it mixes heads and channels, and the weights
that are best for the mixer's outputs are a linear least-squares problem.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from supra.errors import UserError
from supra.model.original import original

# how strongly the projection is held to its own weights, in mean squares of a mixer's output.
# Infinity, which changes nothing, is among them.
RIDGES = (0.01, 0.1, 1.0, torch.inf)


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, projections: bool = False
) -> None:
    """Calibrate every mixer of a freshly converted model on tokens [B, T], in place.

    Some thousand tokens suffice: a scale is one number estimated from all of them.

    projections: also fit the output projections of the attention modules, of B >= 4 rows: three
        quarters of them to fit, the others to choose how far to go. The model's weights are then
        no longer the teacher's. Raises UserError for a family without such a linear layer.
    """
    teacher, pairs = original(model)
    fitted: list[nn.Module] = []
    for attention, teachers in pairs:
        teachers.mixer.register_forward_hook(
            lambda _, inputs, output, mixer=attention.mixer: mixer.calibrate(*inputs, output[0])
        )
        if projections:
            fit = partial(_fit_projection, attention, fitted)
            teachers.register_forward_hook(fit, with_kwargs=True)
    teacher(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    if projections and not fitted:
        raise UserError(
            f"calibrate.projections: {model.config.base_model_type} has no linear output "
            "projection to fit: set it to false"
        )


def _fit_projection(
    attention: nn.Module,
    fitted: list[nn.Module],
    teacher: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    """A forward hook of the teacher's attention module: the student's weights that come closest."""
    projection, read, made = _output_projection(attention, args, kwargs)
    if projection is None:
        return
    fit = len(read) * 3 // 4
    rest = (output[0] - made).float()  # what is missing
    weight, best = torch.zeros_like(projection.weight, dtype=torch.float32), torch.inf
    for ridge in RIDGES:
        change = ridge_regression(read[:fit], rest[:fit], ridge)
        error = (rest[fit:] - read[fit:].float() @ change).square().sum()
        if error < best:
            weight, best = change.mT, error
    projection.weight += weight
    fitted.append(projection)


def ridge_regression(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """W [D, E] of least |y − xW|² + ridge · |x|² / D · |W|², of x [..., D] and y [..., E]."""
    x, y = (z.flatten(0, -2).double() for z in (x, y))
    square = x.mT @ x
    if ridge == torch.inf:
        return torch.zeros_like(x.mT @ y).float()
    square.diagonal().add_(ridge * square.diagonal().mean().clamp(min=1e-30))
    return torch.linalg.solve(square, x.mT @ y).float()


def _output_projection(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Linear | None, Tensor | None, Tensor]:
    """The linear layer whose output the attention module returns, what it reads, and that output.

    None for families that do more with it, or have a layer of another kind there.
    """
    calls = []
    hooks = [
        module.register_forward_hook(lambda *call: calls.append(call))
        for module in attention.children()
        if isinstance(module, nn.Linear)
    ]
    made = attention(*args, **kwargs)[0]
    for hook in hooks:
        hook.remove()
    for module, (read,), output in calls:
        if output is made:
            return module, read, made
    return None, None, made
