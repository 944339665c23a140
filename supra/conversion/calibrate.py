"""Starting values from the teacher's own attention, before any training step.

One pass over some text shows every mixer the inputs of the teacher's attention and its outputs; see
`supra.model.original`. From these the mixer chooses its starting values (`Mixer.calibrate`). The
output projection after the mixer can reduce the remaining error, because it mixes heads and
channels. Its best weights for the mixer's outputs solve a linear least-squares problem.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from supra.errors import UserError
from supra.mixers import Mixer, MixerInputs
from supra.mixers.read_out import SiLUGate
from supra.mixers.ridge import ridge_regression
from supra.model.original import original

# Ridge penalties to try on the change of the projection, relative to the mean square of the mixer's
# output. Infinity leaves the projection as it is.
RIDGES = (0.01, 0.1, 1.0, torch.inf)


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, projections: bool = False
) -> None:
    """Calibrate every mixer of a freshly converted model on tokens [B, T], in place.

    A few thousand tokens are enough, because each scale is one number estimated from all of them.

    projections: also fit the output projections of the attention modules. This needs B >= 4 rows:
        three quarters fit the weights, the rest choose the ridge penalty. The projections then
        differ from the teacher's. Raises UserError for a family without such a linear layer.
    """
    teacher, pairs = original(model)
    fitted: list[nn.Module] = []
    for attention, teachers in pairs:
        targets: list[Tensor] = []
        teachers.mixer.register_forward_hook(
            lambda _, inputs, output, targets=targets: targets.append(output[0])
        )
        start = partial(_calibrate_mixer, attention, targets)
        teachers.register_forward_hook(start, with_kwargs=True)
        if projections:
            fit = partial(_fit_projection, attention, fitted)
            teachers.register_forward_hook(fit, with_kwargs=True)
    with _fresh_casts():
        teacher(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    if projections and not fitted:
        raise UserError(
            f"calibrate.projections: {model.config.base_model_type} has no linear output "
            "projection to fit: set calibrate.projections to false"
        )


def check_calibrated(model: PreTrainedModel) -> None:
    """Raise UserError for a mixer that gives 0, as some do until they are calibrated."""
    for mixer in (module for module in model.modules() if isinstance(module, Mixer)):
        gate = mixer.output_gate
        if isinstance(gate, SiLUGate) and gate.closed:
            raise UserError(
                f"calibrate.tokens (=0) must be above 0: the mixer {mixer.name} gives 0 until it "
                "is calibrated; set it, such as calibrate.tokens=4096"
            )


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Inside, autocast casts a weight each time it is used. It would keep the casts of weights that
    calibration goes on to change."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _calibrate_mixer(
    attention: nn.Module,
    targets: list[Tensor],
    teacher: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    """A forward hook of the teacher's attention module: calibrates the student's mixer.

    The student's module runs to get the inputs, because it may leave out a part of QK-norm.
    """
    inputs: list[MixerInputs] = []
    hook = attention.mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    attention(*args, **kwargs)
    hook.remove()
    attention.mixer.calibrate(inputs[0], targets.pop())


def _fit_projection(
    attention: nn.Module,
    fitted: list[nn.Module],
    teacher: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    """A forward hook of the teacher's attention module: fits the student's output projection."""
    projection, inputs, outputs = _output_projection(attention, args, kwargs)
    if projection is None:
        return
    fit = len(inputs) * 3 // 4
    missing = (output[0] - outputs).float()
    weight, best = torch.zeros_like(projection.weight, dtype=torch.float32), torch.inf
    for ridge in RIDGES:
        change = ridge_regression(inputs[:fit], missing[:fit], ridge)
        error = (missing[fit:] - inputs[fit:].float() @ change).square().sum()
        if error < best:
            weight, best = change.mT, error
    projection.weight += weight
    fitted.append(projection)


def _output_projection(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Linear | None, Tensor | None, Tensor]:
    """The linear layer whose output the attention module returns, its inputs, and its outputs.

    The layer is None for families that return something else, such as a normalised output.
    """
    calls = []
    hooks = [
        module.register_forward_hook(lambda *call: calls.append(call))
        for module in attention.children()
        if isinstance(module, nn.Linear)
    ]
    returned = attention(*args, **kwargs)[0]
    for hook in hooks:
        hook.remove()
    for module, (inputs,), output in calls:
        if output is returned:
            return module, inputs, output
    return None, None, returned
