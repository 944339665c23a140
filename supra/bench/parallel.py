"""`supra bench parallel`: which solver of nonlinear recurrences is fastest, and where.

Some cells contract and some expand. For each cell, method and length, the table shows the sweeps,
the time relative to a loop over the tokens, and the error. The exponent is the Lyapunov exponent:
the mean log growth per token of a small change of the state, from the Jacobians along the solution.
Below 0, changes die out.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median

import torch
from torch import Tensor

from supra.bench import timing
from supra.bench.compile import table
from supra.checkpoint.json_files import to_json
from supra.errors import UserError, check_choice
from supra.parallel import (
    GRU,
    LSTM,
    METHODS,
    Cell,
    FunctionCell,
    NonlinearGated,
    ParaGRU,
    ParaLSTM,
    solve,
)
from supra.parallel.solve import on_all_tokens
from supra.parallel.trust_region import check_trust_region

SWEEPS = 300  # maximum; a method that needs more is not useful
DENSE_NUMBERS = 2**25  # maximum elements of all Jacobians; beyond it, dense methods are left out
DTYPES = {"float32": torch.float32, "float64": torch.float64}  # what the solvers support
COLUMNS = ("cell", "numbers", "exponent", "tokens", "method", "sweeps", "resets", "error", "ms")


def expanding(gain: float, width: int) -> Cell:
    """tanh(h) Wᵀ + x with W ~ N(0, gain² / width). With x ~ N(0, 1), it is chaotic from a gain of
    two or three on."""
    generator = torch.Generator().manual_seed(1)
    weight = gain / width**0.5 * torch.randn(width, width, generator=generator)
    return FunctionCell(lambda state, x: state.tanh() @ weight.to(state).T + x, width)


def gated(largest: float, width: int) -> Cell:
    """One head with a state of width × width numbers."""
    generator = torch.Generator().manual_seed(1)
    return NonlinearGated(largest * (2 * torch.rand(1, width, width, generator=generator) - 1))


CELLS: dict[str, Callable[[int], Cell]] = {
    "gru": lambda width: GRU(width, width),
    "lstm": lambda width: LSTM(width, width),
    "para_gru": lambda width: ParaGRU(width, width),
    "para_lstm": lambda width: ParaLSTM(width, width),
    "nonlinear_gated 0.9": lambda width: gated(0.9, width),
    "nonlinear_gated 2.4": lambda width: gated(2.4, width),
    "tanh 0.5": lambda width: expanding(0.5, width),
    "tanh 1.0": lambda width: expanding(1.0, width),
    "tanh 1.5": lambda width: expanding(1.5, width),
    "tanh 3.0": lambda width: expanding(3.0, width),
}


@dataclass(frozen=True)
class Run:
    """One method on one cell.

    error: the largest difference from the float64 loop's states. If the method does not converge,
        this is the error of the loop that takes over.
    ratio: how many times as long the loop takes, as the median of pairs of runs. It is None, like
        `milliseconds`, if the method did not converge.
    """

    cell: str
    numbers: int
    exponent: float
    tokens: int
    method: str
    sweeps: int
    resets: int
    converged: bool
    residual: float
    error: float
    milliseconds: float | None
    ratio: float | None

    def cells(self) -> list[str]:
        sweeps = str(self.sweeps) if self.converged else f"> {self.sweeps}"
        return [
            self.cell, str(self.numbers), f"{self.exponent:+.2f}", f"{self.tokens:,}", self.method,
            "—" if self.method == "sequential" else sweeps, str(self.resets), f"{self.error:.0e}",
            *("—" if x is None else f"{x:.2f}" for x in (self.milliseconds, self.ratio)),
        ]  # fmt: skip


def report(
    *,
    cells: Sequence[str] = (),
    methods: Sequence[str] = (),
    lengths: Sequence[int] = (256, 2048, 8192),
    widths: Sequence[int] = (16,),
    batch: int = 1,
    dtype: str = "float32",
    repeats: int = 3,
    trust_region: float | str = "auto",
    as_json: bool = False,
) -> None:
    """Print a table, or JSON. Raises UserError for an unknown name or a number out of range."""
    for name in cells:
        check_choice("cells", name, CELLS)
    for name in methods:
        check_choice("methods", name, ("auto", *METHODS))
    check_choice("dtype", dtype, DTYPES)
    check_trust_region(trust_region)
    numbers = {"lengths": lengths, "widths": widths, "batch": [batch], "repeats": [repeats]}
    for name, values in numbers.items():
        if not values or min(values) < 1:
            raise UserError(f"--{name} (={values}) must have whole numbers from 1 on")
    runs = [
        run
        for name, width, tokens in product(cells or CELLS, widths, lengths)
        for run in races(
            name,
            width,
            tokens,
            methods or ("auto", *METHODS),
            batch,
            DTYPES[dtype],
            repeats,
            trust_region,
        )
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if as_json:
        machine = {"machine": timing.processor(device), "torch": torch.__version__}
        print(to_json(machine | {"runs": [asdict(run) for run in runs]}, indent=1))
        return
    print(f"{timing.processor(device)}, torch {torch.__version__}, batch {batch}\n")
    print("\n".join(table((*COLUMNS, "loop's time / its"), [run.cells() for run in runs])))
    print("\n" + "\n".join(winners(runs)))


def races(
    name: str,
    width: int,
    tokens: int,
    methods: Sequence[str],
    batch: int,
    dtype: torch.dtype,
    repeats: int,
    trust_region: float | str,
) -> list[Run]:
    """All methods on one cell and length; they take turns with the loop."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    cell = CELLS[name](width).to(device)
    inputs = _inputs(cell, batch, tokens, width, device)
    with torch.no_grad():
        exact = solve(cell.double(), _as(inputs, torch.float64), None, "sequential").states
        exponent = lyapunov(cell, _as(inputs, torch.float64), exact)
        cell, inputs = cell.to(dtype), _as(inputs, dtype)
        numbers = exact[0, 0].numel()
        dense = numbers**2 * tokens * batch > DENSE_NUMBERS and cell.structure.value == "dense"
        chosen = [m for m in methods if not (dense and m not in ("sequential", "auto"))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about loops that take over
            solutions = [_solver(cell, inputs, method, trust_region)() for method in chosen]
        # a method that does not converge is not worth timing
        timed = [m for m, x in zip(chosen, solutions, strict=True) if x.converged]
        methods = ("sequential", *timed)
        functions = [_solver(cell, inputs, method, trust_region) for method in methods]
        loop, *others = timing.interleaved(functions, repeats, device)
        times = dict(zip(timed, others, strict=True))
    runs = []
    for method, solution in zip(chosen, solutions, strict=True):
        taken = times.get(method)
        runs.append(
            Run(
                name, numbers, exponent, tokens,
                f"auto: {solution.method}" if method == "auto" else method,
                solution.iterations, solution.resets, solution.converged, solution.residual,
                (solution.states - exact).abs().max().item(),
                1e3 * median(taken) if taken else None,
                timing.Ratio.of(taken, loop).median if taken else None,
            )
        )  # fmt: skip
    return runs


def _solver(cell: Cell, inputs, method: str, trust_region: float | str) -> Callable:
    return lambda: solve(
        cell, inputs, None, method, trust_region=trust_region, max_iterations=SWEEPS
    )


def _inputs(cell: Cell, batch: int, tokens: int, width: int, device: str):
    if not isinstance(cell, NonlinearGated):
        return torch.randn(batch, tokens, width, device=device)
    key = torch.nn.functional.normalize(torch.randn(batch, tokens, 1, width), dim=-1)
    value = torch.randn(batch, tokens, 1, width)
    log_decay = torch.nn.functional.logsigmoid(torch.randn(batch, tokens, 1))
    return tuple(x.to(device) for x in (key, value, log_decay))


def _as(inputs, dtype: torch.dtype):
    return tuple(x.to(dtype) for x in inputs) if isinstance(inputs, tuple) else inputs.to(dtype)


def lyapunov(cell: Cell, inputs, states: Tensor) -> float:
    """The largest Lyapunov exponent: log growth per token of a random tangent over the solution."""
    drive = cell.project(inputs)
    start = cell.empty_state(drive)
    before = torch.cat([start[:, None], states[:, :-1]], dim=1)
    _, matrix = on_all_tokens(cell.linearise, before, drive)
    tangent = torch.randn(start.shape, generator=torch.Generator().manual_seed(0)).to(start)
    total = 0.0
    for t in range(states.shape[1]):
        tangent = cell.structure.apply(matrix[:, t], tangent)
        size = tangent.norm().clamp(min=1e-300)
        total += size.log().item()
        tangent = tangent / size
    return total / states.shape[1]


def winners(runs: Sequence[Run]) -> list[str]:
    """For each cell and length, a line with the fastest method that converged."""
    lines = []
    for name, numbers, tokens in dict.fromkeys((x.cell, x.numbers, x.tokens) for x in runs):
        some = [x for x in runs if (x.cell, x.numbers, x.tokens) == (name, numbers, tokens)]
        best = max((x for x in some if x.converged), key=lambda x: x.ratio)
        lines.append(
            f"{name}, {numbers} numbers, {tokens:,} tokens: {best.method}, {best.ratio:.2f} times "
            "as fast as the loop"
        )
    return lines
