"""The plan of a run as a table for people, and as JSON for programs."""

from dataclasses import asdict, dataclass
from typing import Any

from supra.checkpoint.conversion_report import describe_layers
from supra.planning.hardware import GB, Hardware, Rate
from supra.planning.memory import LIMIT, Memory
from supra.planning.remedies import Remedy
from supra.planning.simulate import Simulated


@dataclass(frozen=True)
class StagePlan:
    """One stage. Bytes are those of one process.

    tokens: of its steps, which round up. trained: parameters by kind. simulated: the memory by
    torch's tracker, if it was asked for. kept_per_token: bytes of the activations of the largest
    block, by part. remedies: empty where the stage fits. together: several of them, where none is
    enough by itself.
    """

    name: str
    steps: int
    tokens: int
    tokens_per_step: int
    trained: dict[str, int]
    memory: Memory
    fits: bool
    simulated: Simulated | None
    remedies: list[Remedy]
    together: Remedy | None
    kept_per_token: dict[str, float]
    flops: float
    hours: float
    cost: float | None


@dataclass(frozen=True)
class RunPlan:
    """What `supra plan` prints."""

    family: str
    layers: list[str]
    hardware: Hardware
    rate: Rate
    parameters: dict[str, int]
    stages: list[StagePlan]

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return all(stage.fits for stage in self.stages)

    @property
    def hours(self) -> float:
        """Of all stages."""
        return sum(stage.hours for stage in self.stages)

    @property
    def cost(self) -> float | None:
        """Of all stages; None without a price."""
        return None if self.rate.price is None else sum(stage.cost for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        sums = {"fits": self.fits, "hours": self.hours, "cost": self.cost}
        return asdict(self) | sums

    def lines(self) -> list[str]:
        """Tables for a terminal."""
        return [
            f"student:  {self.family}, {describe_layers(self.layers)}",
            f"hardware: {self._hardware()}",
            *("", "parameters"),
            *_table(["", "all", *(f"trained in {x.name}" for x in self.stages)], self._kinds()),
            *("", "memory of a process, in GB"),
            *_table(["", *(stage.name for stage in self.stages)], self._memory()),
            *("", "activations of the largest block, in bytes per token"),
            *_table(["", *(stage.name for stage in self.stages)], self._block()),
            *("", "work"),
            *_table(["", *(stage.name for stage in self.stages), "all"], self._work()),
            *(line for stage in self.stages if not stage.fits for line in self._changes(stage)),
        ]

    def _hardware(self) -> str:
        nodes = f"{self.hardware.nodes} x " if self.hardware.nodes > 1 else ""
        gpus = f"{nodes}{self.hardware.gpus.count} x {self.hardware.gpus.gigabytes} GB"
        shared = f", {self.hardware.cp_size} for each row" if self.hardware.cp_size > 1 else ""
        return f"{gpus}{shared}, recipes/launch/{self.hardware.launch}.yaml"

    def _kinds(self) -> list[list[str]]:
        columns = [self.parameters, *(stage.trained for stage in self.stages)]
        rows = [[x, *(f"{column.get(x, 0):,}" for column in columns)] for x in self.parameters]
        return [*rows, ["all", *(f"{sum(column.values()):,}" for column in columns)]]

    def _memory(self) -> list[list[str]]:
        parts = dict.fromkeys(part for stage in self.stages for part in stage.memory.parts)
        rows = [
            [part, *(_gigabytes(stage.memory.parts.get(part, 0)) for stage in self.stages)]
            for part in parts
            if any(stage.memory.parts.get(part) for stage in self.stages)
        ]
        peaks = [_gigabytes(stage.memory.peak) for stage in self.stages]
        limit = f"fits in {LIMIT:.0%} of {self.hardware.gpus.gigabytes} GB"
        fits = ["yes" if stage.fits else "no" for stage in self.stages]
        tracked = [_gigabytes(stage.simulated.peak) for stage in self.stages if stage.simulated]
        simulated = [["at the peak, simulated", *tracked]] if tracked else []
        return [*rows, ["at the peak", *peaks], *simulated, [limit, *fits]]

    def _block(self) -> list[list[str]]:
        parts = dict.fromkeys(part for stage in self.stages for part in stage.kept_per_token)
        return [
            [part, *(f"{stage.kept_per_token.get(part, 0):,.0f}" for stage in self.stages)]
            for part in parts
        ]

    def _work(self) -> list[list[str]]:
        stages, rate, gpus = self.stages, self.rate, self.hardware.processes
        numbers = {
            "tokens": [stage.tokens for stage in stages],
            "steps": [stage.steps for stage in stages],
            "FLOPs": [stage.flops for stage in stages],
            f"hours at {rate.mfu:g} x {rate.tflops:g} TFLOPs": [x.hours for x in stages],
            "hours of GPUs": [x.hours * gpus for x in stages],
        }
        if rate.price is not None:
            numbers["cost"] = [stage.cost for stage in stages]
        rows = [[name, *map(_number, [*x, sum(x)])] for name, x in numbers.items()]
        per_step = ["tokens of a step", *(f"{stage.tokens_per_step:,}" for stage in stages), ""]
        return [rows[0], per_step, *rows[1:]]

    def _changes(self, stage: StagePlan) -> list[str]:
        lines = ["", f"{stage.name} does not fit. Each change by itself:"]
        for number, remedy in enumerate(stage.remedies, start=1):
            lines.append(f"{number}. {self._saving(remedy)}")
        if stage.together is not None:
            lines.append(f"Together: {self._saving(stage.together)}")
        if not any(self._is_enough(x) for x in (*stage.remedies, stage.together) if x is not None):
            lines.append("That is not enough: take GPUs with more memory, or a smaller model.")
        return lines

    def _saving(self, remedy: Remedy) -> str:
        fits = ", fits" if self._is_enough(remedy) else ""
        saves, peak = _gigabytes(remedy.saves), _gigabytes(remedy.peak)
        return f"{remedy.change}: saves {saves} GB, leaves {peak} GB{fits}"

    def _is_enough(self, remedy: Remedy) -> bool:
        return remedy.peak <= LIMIT * self.hardware.memory


def _gigabytes(size: int) -> str:
    return f"{size / GB:,.1f}" if size >= GB / 20 or size == 0 else f"{size / GB:.2g}"


def _number(value: float) -> str:
    """Whole numbers whole, others to three digits."""
    if isinstance(value, int) and value < 10**15:
        return f"{value:,}"
    return f"{value:,.0f}" if 100 <= value < 10**15 else f"{value:.3g}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the numbers to the right."""
    rows = [head, *rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
