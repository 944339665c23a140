"""`supra bench kernels`: the speed of the operations, compared with what one would use instead.

With one length: times, and ratios to every rival that is installed. With several lengths: how time
and peak memory grow. Each measurement then has its own process, and rivals only decode.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any, NamedTuple

import torch

from supra.bench import timing
from supra.bench.compile import table
from supra.bench.rivals import OPERATIONS, Contender, Setting
from supra.bench.workers import run_parallel
from supra.checkpoint.json_files import to_json
from supra.errors import UserError, check_choice

FORWARD, TRAINING, DECODING = DIRECTIONS = ("forward", "forward+backward", "decode step")
PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention")
WARM_LENGTH = 64


class Job(NamedTuple):
    """One function to measure; supra's own function if rival is None."""

    operation: str
    direction: str
    backend: str
    rival: str | None
    setting: Setting


@dataclass(frozen=True)
class Race:
    """supra against one rival: median milliseconds, and how many times as long the rival takes."""

    operation: str
    direction: str
    backend: str
    shape: list[int]
    dtype: str
    milliseconds: float
    rival: str | None = None
    rival_milliseconds: float | None = None
    best_ratio: float | None = None
    median_ratio: float | None = None

    def cells(self) -> list[str]:
        shape = "×".join(map(str, self.shape))
        cells = [self.operation, self.direction, self.backend, shape, self.dtype]
        cells.append(f"{self.milliseconds:.3f}")
        if self.rival is None:
            return [*cells, "—", "—", "—", "—"]
        ratios = (f"{self.best_ratio:.2f}", f"{self.median_ratio:.2f}")
        return [*cells, self.rival, f"{self.rival_milliseconds:.3f}", *ratios]


@dataclass(frozen=True)
class Growth:
    """One length: time, and the growth of peak memory, including inputs and the state or cache."""

    operation: str
    direction: str
    contender: str
    length: int
    milliseconds: float
    microseconds_per_token: float
    peak_mib: float

    def cells(self) -> list[str]:
        return [
            self.operation, self.direction, self.contender, str(self.length),
            f"{self.milliseconds:.3f}", f"{self.microseconds_per_token:.3f}",
            f"{self.peak_mib:.1f}",
        ]  # fmt: skip


RACE_HEADER = (
    "operation", "direction", "backend", "B×T×H×size", "dtype", "ms", "against", "its ms",
    "ratio of best", "median ratio",
)  # fmt: skip
GROWTH_HEADER = ("operation", "direction", "by", "T", "ms", "µs per token", "peak MiB")


def report(
    *,
    operations: Sequence[str] = (),
    lengths: Sequence[int] = (2048,),
    heads: int = 8,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    repeats: int = 10,
    as_json: bool = False,
) -> None:
    """Measure and print; see the options of the command."""
    operations = list(operations) or list(OPERATIONS)
    for name in operations:
        check_choice("operation", name, OPERATIONS)
    numbers = {"heads": heads, "head-size": head_size, "batch": batch, "repeats": repeats}
    for name, value in [*numbers.items(), *(("lengths", length) for length in lengths)]:
        if value < 1:
            raise UserError(f"--{name} (={value}) must be at least 1")
    if not lengths:
        raise UserError("--lengths must name at least one length, such as 2048")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = ("triton",) if device == "cuda" else ("torch",)
    settings = [Setting(batch, n, heads, head_size, dtype, device) for n in lengths]
    chosen = product(operations, DIRECTIONS, backends)
    if len(settings) == 1:
        rows = [row for x in chosen for row in race(*x, settings[0], repeats)]
        header = RACE_HEADER
    else:
        rows = [grow(job, repeats) for x in chosen for job in growth_jobs(*x, settings)]
        header = GROWTH_HEADER
    if as_json:
        print(to_json({**machine(device), "rows": [asdict(row) for row in rows]}, indent=1))
        return
    lines = [f"{name}: {value}" for name, value in machine(device).items()]
    print("\n".join([*lines, "", *table(header, [row.cells() for row in rows])]))


def machine(device: str) -> dict[str, str]:
    return {"machine": timing.processor(device)} | {
        package: _version(package) for package in PACKAGES
    }


def race(
    operation: str,
    direction: str,
    backend: str,
    setting: Setting,
    repeats: int,
    rivals: Sequence[str] | None = None,
) -> list[Race]:
    """supra against `rivals`, or against every one that is installed; they take turns."""
    rivals = _rivals(operation, direction, setting) if rivals is None else rivals
    jobs = [Job(operation, direction, backend, name, setting) for name in (None, *rivals)]
    times = timing.interleaved([prepare(job) for job in jobs], repeats, setting.device)
    ours, dtype = times[0], str(setting.dtype).removeprefix("torch.")
    begin = (operation, direction, backend, list(setting[:4]), dtype, _milliseconds(ours))
    if not rivals:
        return [Race(*begin)]
    return [
        Race(*begin, rival, _milliseconds(theirs), *timing.Ratio.of(ours, theirs))
        for rival, theirs in zip(rivals, times[1:], strict=True)
    ]


def growth_jobs(
    operation: str, direction: str, backend: str, settings: Sequence[Setting]
) -> Iterable[Job]:
    rivals = _rivals(operation, direction, settings[0]) if direction == DECODING else []
    for rival, setting in product((None, *rivals), settings):
        yield Job(operation, direction, backend, rival, setting)


def grow(job: Job, repeats: int) -> Growth:
    title = f"{job.operation} {job.direction} {job.setting.length}"
    ((best, peak),) = run_parallel(measure_alone, [(job, repeats)], 1, {}, title)
    tokens = job.setting.batch * (1 if job.direction == DECODING else job.setting.length)
    return Growth(
        job.operation, job.direction, job.rival or job.backend, job.setting.length,
        best * 1e3, best * 1e6 / tokens, peak / 2**20,
    )  # fmt: skip


def measure_alone(work: tuple[Job, int]) -> tuple[float, int]:
    """Seconds of the best run, and the growth of the peak memory of this fresh process."""
    job, repeats = work
    short = job.setting._replace(length=min(WARM_LENGTH, job.setting.length))
    prepare(job._replace(setting=short))()  # libraries are loaded and set up
    timing.forget_peak_memory(job.setting.device)
    before = timing.peak_memory(job.setting.device)
    (times,) = timing.interleaved([prepare(job)], repeats, job.setting.device)
    return min(times), timing.peak_memory(job.setting.device) - before


def prepare(job: Job) -> Callable[[], Any]:
    """The function to measure, with its inputs already made."""
    torch.manual_seed(0)
    operation = OPERATIONS[job.operation]
    contender = operation.rivals[job.rival] if job.rival else operation.ours(job.backend)
    if job.direction == DECODING:
        return torch.no_grad()(contender.step(job.setting))
    inputs = operation.inputs(job.setting)
    if job.direction == FORWARD:
        return torch.no_grad()(lambda: contender.whole(**inputs))
    for x in inputs.values():
        x.requires_grad_()

    def train() -> None:
        output = contender.whole(**inputs)
        torch.autograd.grad(
            output, list(inputs.values()), torch.ones_like(output), allow_unused=True
        )

    return train


def _rivals(operation: str, direction: str, setting: Setting) -> list[str]:
    rivals = OPERATIONS[operation].rivals.items()
    return [name for name, x in rivals if does(x, direction) and x.runs(setting.device)]


def does(contender: Contender, direction: str) -> bool:
    return (contender.step if direction == DECODING else contender.whole) is not None


def _milliseconds(times: Sequence[float]) -> float:
    return 1e3 * torch.tensor(times, dtype=torch.float64).median().item()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
