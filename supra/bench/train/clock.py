"""Where the time of a training step goes."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from supra.losses.chunked import language_model
from supra.uptrain.loop import Run
from supra.uptrain.stage_settings import LAYERWISE

REST = "rest"


class Clock:
    """seconds: by part, each without the parts inside it. On a GPU every part waits for the device,
    so that parts take longer than a step that is not watched."""

    def __init__(self, device: str):
        self.device, self.seconds = device, Counter()
        self._inside: list[float] = []  # of each open part, the seconds of the parts inside it

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._inside.append(0.0)
        started = now(self.device)
        try:
            yield
        finally:
            taken, inside = now(self.device) - started, self._inside.pop()
            self.seconds[name] += taken - inside
            if self._inside:
                self._inside[-1] += taken

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def watch(self, stack: ExitStack, owner: Any, attribute: str, name: str) -> None:
        """Until the stack is closed, calls of owner.attribute belong to a part."""
        call = self.timed(name, getattr(owner, attribute))
        stack.enter_context(mock.patch.object(owner, attribute, call))


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_by_part(run: Run, device: str) -> dict[str, float]:
    """Of one more step of a run, which takes part in the training; the largest part first."""
    clock = Clock(device)
    with ExitStack() as stack:
        clock.watch(stack, run.stream, "step", "data")
        clock.watch(stack, Tensor, "backward", "backward")
        clock.watch(stack, nn.utils, "clip_grad_norm_", "clipping")
        clock.watch(stack, run.optimizer, "step", "optimizer")
        if run.stage.name in LAYERWISE:
            teacher, pairs = run.layers
            clock.watch(stack, teacher, "forward", "teacher")
            for student, _ in pairs:
                clock.watch(stack, student, "forward", "student")
        else:
            student = language_model(run.model.model)
            clock.watch(stack, student.base_model, "forward", "student")
            clock.watch(stack, run.model, "forward", "head and losses")
        if run.teacher is not None and run.stage.name not in LAYERWISE:
            clock.watch(stack, run.teacher, "targets", "teacher")
        with clock.part(REST):
            run.train_step()
    return dict(clock.seconds.most_common())
