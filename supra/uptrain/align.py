"""The gradient of one step of the stages orient and align: each layer learns from the teacher's.

The teacher is the student before training, with softmax attention in it (see
`supra.model.original`). One pass of the teacher gives each of the student's attention modules the
inputs of the teacher's module. The student's module runs and is differentiated at once. Thus no
layer inherits errors of other layers, gradients do not flow through the depth, and activations
take the memory of one layer.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supra.data.packing import Block
from supra.errors import UserError
from supra.mixers import Mixer, MixerInputs
from supra.uptrain.shards import whole
from supra.uptrain.stage_settings import AlignConfig, OrientConfig

MIN_WEIGHT = 1e-9  # whose logarithm is taken in the place of log 0, which some features give


class LayerByLayer:
    """Each layer's error is |student - teacher|² / |teacher|². It is 0 for a perfect layer, and 1
    for an output of zeros. With a cross entropy, it is `row_divergence`.

    Without the division, errors of different layers differ by a factor of up to 200 (LoLCATs,
    arXiv 2410.10254). Gradients still differ that much, so each layer's gradient is clipped
    separately.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: nn.Module,  # headless
        pairs: Sequence[tuple[nn.Module, nn.Module]],  # attention modules: (student's, teacher's)
        stage: AlignConfig | OrientConfig,
        autocast: Callable[[], AbstractContextManager],
    ):
        if isinstance(stage, OrientConfig) and stage.loss == "cross_entropy":
            check_averages([student.mixer for student, _ in pairs])
        self.accelerator, self.teacher, self.pairs = accelerator, teacher, pairs
        self.stage, self.autocast = stage, autocast
        # of the current layer: the mixers' calls, and the output of the teacher's module
        self.seen: dict[str, _Mixed] = {}
        self.target: Tensor | None = None

    def add_gradients(self, batches: Sequence[Block]) -> dict[str, float]:
        """Add the mean gradient over all micro-batches of all processes, clipped per layer.

        Returns the mean error of the layers, the error of the worst layer, and the norm of all
        gradients before clipping.
        """
        errors = sum(self.errors(batch, 1 / len(batches)) for batch in batches) / len(batches)
        errors = self.accelerator.reduce(errors, reduction="mean")
        norms, clip = [], self.stage.optimizer.clip or math.inf
        for student, _ in self.pairs:
            parameters = [x for x in student.parameters() if x.grad is not None]
            if self.accelerator.num_processes > 1:
                for parameter in parameters:
                    if not isinstance(parameter.grad, DTensor):  # else FSDP has taken the mean
                        parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
            if parameters:
                norms.append(whole(nn.utils.clip_grad_norm_(parameters, clip)))
        values = {"loss": errors.mean(), "worst_layer": errors.max()}
        values["grad_norm"] = torch.stack(norms).norm()
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

    def errors(self, batch: Block, weight: float) -> Tensor:
        """The error of every layer on a micro-batch. Adds the gradient, multiplied by `weight`.

        Without position_ids, each row is one document.
        """
        errors: list[Tensor] = []
        names = [x for x in ("input_ids", "position_ids") if x in batch]
        inputs = {x: batch[x].to(self.accelerator.device) for x in names}
        with ExitStack() as hooks:
            for student, teacher in self.pairs:
                learn = partial(self._learn, student, weight, errors)
                for hook in (
                    student.mixer.register_forward_hook(partial(self._see, "student")),
                    teacher.mixer.register_forward_hook(partial(self._see, "teacher")),
                    # before FSDP's hooks, which take the weights apart
                    student.register_forward_hook(self._error, prepend=True),
                    teacher.register_forward_hook(learn, prepend=True, with_kwargs=True),
                ):
                    hooks.callback(hook.remove)
            with torch.no_grad(), self.autocast():
                self.teacher(**inputs, use_cache=False)
        self.seen.clear()
        self.target = None
        return torch.stack(errors)

    def _see(
        self, whose: str, mixer: Mixer, args: tuple[Any, ...], output: tuple[Any, ...]
    ) -> None:
        """A forward hook of a mixer: remembers its inputs and output."""
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
        """A forward hook of the teacher's attention module: trains the student's module on the same
        inputs."""
        self.target = output[0]
        with torch.enable_grad():
            error = student(*args, **kwargs)  # see _error
            loss = weight * error
        if loss.requires_grad:  # not if the stage trains only new parameters and the mixer has none
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()
        errors.append(error.detach())

    def _error(
        self, student: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]
    ) -> Tensor:
        """A forward hook of the student's attention module: puts the error in the place of the
        output. FSDP acts on what a module returns, and the loss must be all of it."""
        ours, theirs = self.seen["student"], self.seen["teacher"]
        if isinstance(self.stage, OrientConfig):
            matrices = (x.mixer.mixing_matrix(x.inputs) for x in (ours, theirs))
            squared = self.stage.loss == "squared"
            return (matrix_error if squared else row_divergence)(*matrices)
        if self.stage.target == "output":
            return relative_error(ours.output, theirs.output)
        return relative_error(output[0], self.target)


class _Mixed(NamedTuple):
    """One call of a mixer."""

    mixer: Mixer
    inputs: MixerInputs
    output: Tensor


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """|output - target|² / |target|² over all elements, in float32."""
    output, target = output.float(), target.float()
    return (output - target).square().sum() / target.square().sum()


def check_averages(mixers: Sequence[Mixer]) -> None:
    """Raise UserError for a mixer whose weights have no cross entropy."""
    for mixer in mixers:
        if not mixer.averages:
            raise UserError(
                "orient.loss (=cross_entropy) compares weights that sum to one, and those of "
                f"{mixer.name} need not: convert with hedgehog, t2r or window, or set orient.loss "
                "to squared"
            )


def row_divergence(matrix: Tensor, target: Tensor) -> Tensor:
    """−Σⱼ aᵢⱼ log bᵢⱼ + Σⱼ aᵢⱼ log aᵢⱼ of the rows of b and of the target a, [B, Hq, T, T], as a
    mean over rows: Hedgehog's cross entropy (Zhang et al. 2024, equation 6) without what no student
    can change, the entropy of the target. 0 for a perfect layer."""
    matrix, target = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (matrix, target))
    log_ratio = target.clamp(min=MIN_WEIGHT).log() - matrix.clamp(min=MIN_WEIGHT).log()
    return (target * log_ratio).sum(-1).mean()


def matrix_error(matrix: Tensor, target: Tensor) -> Tensor:
    """The relative error of every head's matrix [B, Hq, T, T], as a mean over heads."""
    matrix, target = matrix.float(), target.float()
    others = (0, 2, 3)
    return ((matrix - target).square().sum(others) / target.square().sum(others)).mean()
