"""What `supra bench gpu` measures, in this order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from supra.bench.gpu import checks, compiling, decoding, races, training
from supra.bench.gpu.models import SMALL, STUDENTS, TEACHER, WHOLE, Sizes
from supra.bench.kernels import DECODING, FORWARD, TRAINING, does
from supra.bench.rivals import OPERATIONS, Setting

CHECKS, COMPILE, OPERATION, STEP, TRAIN, DECODE = GROUPS = (
    "checks", "compile", "operations", "steps", "training", "decoding",
)  # fmt: skip
LEFT_OUT = "transformers"  # its torch code is no rival on a GPU


class Row(NamedTuple):
    """function(*arguments) in the worker gives the values of the row `key`."""

    key: tuple[str, ...]
    function: Callable[..., dict[str, Any]]
    arguments: tuple

    @property
    def group(self) -> str:
        return self.key[0]


@dataclass(frozen=True)
class Plan:
    """The sizes of all rows."""

    device: str
    lengths: tuple[int, ...]  # of operations
    tokens: int  # in a batch of an operation
    heads: int
    head_sizes: tuple[int, ...]  # the first at all lengths, the others at the second length
    repeats: int
    odd: tuple[int, ...]  # batch, tokens, heads and head size of checks: no multiple of any tile
    large: tuple[int, ...]  # the same of a large check
    models: Sizes
    contexts: tuple[tuple[int, int], ...]  # of decoding: batch and tokens of context

    def rows(self, folder: Path) -> Iterator[Row]:
        """folder: for models and texts."""
        yield from self._checks()
        yield from self._compiling()
        yield from self._rival_checks()
        yield from self._races(OPERATION, (FORWARD, TRAINING))
        yield from self._races(STEP, (DECODING,))
        for mixer, stage in product(STUDENTS, training.STAGES):
            arguments = (folder, mixer, stage, self.models, self.device)
            yield Row((TRAIN, mixer, stage), training.measure, arguments)
        for (batch, length), model in product(self.contexts, (TEACHER, *STUDENTS)):
            arguments = (folder, model, batch, length, self.models, self.device)
            yield Row((DECODE, f"{batch} × {length:,}", model), decoding.measure, arguments)

    def _checks(self) -> Iterator[Row]:
        for operation in OPERATIONS:
            for name, setting in checks.settings(self.device, self.odd, self.large).items():
                yield Row((CHECKS, operation, name), checks.compare, (operation, setting))
            arguments = operation, Setting(*self.odd, torch.float32, self.device)
            yield Row((CHECKS, operation, "decoding steps"), checks.compare_steps, arguments)

    def _compiling(self) -> Iterator[Row]:
        for size, (operation, rival) in product(self.head_sizes, rivals()):
            if rival == "fla":
                setting = races.setting(self.device, self.tokens, self.lengths[0], self.heads, size)
                row = (COMPILE, operation, str(size))
                yield Row(row, compiling.compile_all, (operation, setting))

    def _rival_checks(self) -> Iterator[Row]:
        for operation, rival in rivals():
            if rival in races.SAME:
                arguments = operation, rival, checks.rival_setting(self.device)
                yield Row((CHECKS, operation, f"as {rival}"), checks.compare_rival, arguments)

    def _races(self, group: str, directions: tuple[str, ...]) -> Iterator[Row]:
        """Every operation alone, then beside each rival."""
        shapes = [(length, self.head_sizes[0]) for length in self.lengths]
        if group == OPERATION:
            shapes += [(self.lengths[1], size) for size in self.head_sizes[1:]]
        for operation, (length, size), direction in product(OPERATIONS, shapes, directions):
            setting = races.setting(self.device, self.tokens, length, self.heads, size)
            for rival in (None, *(x for name, x in rivals(direction) if name == operation)):
                key = (group, operation, direction, f"{length:,}", str(size), rival or "supra")
                yield Row(key, races.measure, (operation, direction, rival, setting, self.repeats))


def rivals(direction: str = FORWARD) -> Iterator[tuple[str, str]]:
    """Pairs of an operation and the name of a rival that takes part on a GPU."""
    for operation, entry in OPERATIONS.items():
        for name, contender in entry.rivals.items():
            if name != LEFT_OUT and does(contender, direction):
                yield operation, name


ON_A_GPU = Plan(
    device="cuda",
    lengths=(2048, 8192, 32768),
    tokens=32768,
    heads=16,
    head_sizes=(64, 128),
    repeats=10,
    odd=(2, 77, 3, 20),
    large=(2, 4096, 4, 64),
    models=WHOLE,
    contexts=((1, 2048), (1, 8192), (1, 32768), (16, 2048)),
)
REHEARSAL = Plan(  # one row with one head: the interpreter takes a tenth of a second for a program
    device="cpu",
    lengths=(9, 17, 33),
    tokens=1,
    heads=1,
    head_sizes=(16, 32),
    repeats=1,
    odd=(1, 37, 2, 20),
    large=(1, 70, 2, 16),
    models=SMALL,
    contexts=((1, 20), (2, 20)),
)
