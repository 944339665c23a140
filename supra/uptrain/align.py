"""The gradient of one step of the stages orient and align: every layer learns from its teacher's.

One pass of the teacher, which is the student before training with softmax attention in it (see
`supra.model.original`), shows each of the student's attention modules what the teacher's module
reads.
It computes on that at once and is differentiated at once. So no layer inherits another one's
errors, there is no back-propagation through the depth, and memory is that of one layer.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from supra.data.packing import Block
from supra.mixers import Mixer, MixerInputs
from supra.uptrain.config import AlignConfig, OrientConfig


class LayerByLayer:
    """Each layer's error is |student - teacher|² / |teacher|²: 0 is perfect, and an output of zeros
    has 1. Errors of different layers differ by up to 200 times before they are divided (LoLCATs,
    arXiv 2410.10254), and gradients still do, so that each layer's is clipped by itself."""

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: nn.Module,  # headless
        pairs: Sequence[tuple[nn.Module, nn.Module]],  # the attention modules: student's, teacher's
        stage: AlignConfig | OrientConfig,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.accelerator, self.teacher, self.pairs = accelerator, teacher, pairs
        self.stage, self.autocast = stage, autocast
        self.seen: dict[str, _Mixed] = {}  # of the layer that runs

    def add_gradients(self, batches: Sequence[Block]) -> dict[str, float]:
        """Mean gradient of all micro-batches of all processes, clipped layer by layer.

        Returns the mean error of the layers, that of the worst, and the norm of all gradients
        before clipping.
        """
        errors = sum(self._errors(batch, 1 / len(batches)) for batch in batches) / len(batches)
        errors = self.accelerator.reduce(errors, reduction="mean")
        norms, clip = [], self.stage.optimizer.clip or math.inf
        for student, _ in self.pairs:
            parameters = [x for x in student.parameters() if x.grad is not None]
            if self.accelerator.num_processes > 1:
                for parameter in parameters:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
            if parameters:
                norms.append(nn.utils.clip_grad_norm_(parameters, clip))
        values = {"loss": errors.mean(), "worst_layer": errors.max()}
        values["grad_norm"] = torch.stack(norms).norm()
        return {name: value.item() for name, value in values.items()}

    def _errors(self, batch: Block, weight: float) -> Tensor:
        """The error of every layer on a micro-batch; adds `weight` times its gradient."""
        errors: list[Tensor] = []
        inputs = {x: batch[x].to(self.accelerator.device) for x in ("input_ids", "position_ids")}
        with ExitStack() as hooks:
            for student, teacher in self.pairs:
                learn = partial(self._learn, student, weight, errors)
                for hook in (
                    student.mixer.register_forward_hook(partial(self._see, "student")),
                    teacher.mixer.register_forward_hook(partial(self._see, "teacher")),
                    teacher.register_forward_hook(learn, with_kwargs=True),
                ):
                    hooks.callback(hook.remove)
            with torch.no_grad(), self.autocast():
                self.teacher(**inputs, use_cache=False)
        self.seen.clear()
        return torch.stack(errors)

    def _see(
        self, whose: str, mixer: Mixer, args: tuple[Any, ...], output: tuple[Any, ...]
    ) -> None:
        """A forward hook of a mixer."""
        self.seen[whose] = _Mixed(mixer, args[0], output[0])

    def _learn(
        self,
        student: nn.Module,
        weight: float,
        errors: list[Tensor],
        teacher: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: tuple[Tensor, ...],
    ) -> None:
        """A forward hook of the teacher's attention module: the student's runs on the same."""
        with torch.enable_grad():
            hidden, *_ = student(*args, **kwargs)
            ours, theirs = self.seen["student"], self.seen["teacher"]
            if isinstance(self.stage, OrientConfig):
                matrices = (x.mixer.mixing_matrix(x.inputs) for x in (ours, theirs))
                error = matrix_error(*matrices)
            elif self.stage.target == "output":
                error = relative_error(ours.output, theirs.output)
            else:
                error = relative_error(hidden, output[0])
            loss = weight * error
        if loss.requires_grad:  # some mixers have no new parameters, for a stage of those alone
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()
        errors.append(error.detach())


class _Mixed(NamedTuple):
    """One call of a mixer."""

    mixer: Mixer
    inputs: MixerInputs
    output: Tensor


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """|output - target|² / |target|² over all elements, in float32."""
    output, target = output.float(), target.float()
    return (output - target).square().sum() / target.square().sum()


def matrix_error(matrix: Tensor, target: Tensor) -> Tensor:
    """The same of every head's matrix [B, Hq, T, T], and the mean over heads."""
    matrix, target = matrix.float(), target.float()
    others = (0, 2, 3)
    return ((matrix - target).square().sum(others) / target.square().sum(others)).mean()
