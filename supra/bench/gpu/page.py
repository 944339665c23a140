"""The page that `supra bench gpu` writes, and the line that it prints for each row."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from supra.bench.compile import table
from supra.bench.gpu.results import FAILED, SECONDS
from supra.bench.gpu.rows import CHECKS, COMPILE, DECODE, GROUPS, OPERATION, STEP, TRAIN, Row

Values = dict[str, Any]
Rows = dict[tuple[str, ...], Values]

OURS = "supra"
NONE = "—"
TITLES = {
    CHECKS: "Are the kernels right?",
    COMPILE: "Compilation of flash-linear-attention",
    OPERATION: "Operations",
    STEP: "Decoding steps of operations",
    TRAIN: "Training",
    DECODE: "Decoding of models",
}
TEXTS = {
    CHECKS: "The largest relative error (root mean square) among the output and all gradients.",
    COMPILE: "All configurations that its autotuner will time, compiled on all cores.",
    OPERATION: "Median milliseconds in bfloat16. A rival's cell has its time, and how many times "
    "as long as supra it took in the same run.",
    STEP: "One token of every row, after as many tokens as the table says.",
    TRAIN: "Whole optimizer steps of a random model of the size of SmolLM2-135M, 16 rows of 1,024 "
    "tokens. MFU is the share of the GPU's peak in bfloat16.",
    DECODE: "One token of every row in transformers, eagerly: `generate` uses no CUDA graphs. The "
    "models are those of the training.",
}
REHEARSED = (
    "**A rehearsal on a CPU, with tiny shapes in Triton's interpreter: no time here means "
    "anything.**"
)


def line(key: tuple[str, ...], values: Values) -> str:
    """One row as text."""
    return f"{', '.join(key)}: {_described(key[0], values)} [{values[SECONDS]:.0f} s]"


def page(machine: Values, planned: Sequence[Row], found: Rows) -> str:
    """The whole page in Markdown. Rows that are not measured yet are counted."""
    lines = ["# Measurements on a GPU", "", "Made by `supra bench gpu`.", ""]
    if machine["rehearsal"]:
        lines += [REHEARSED, ""]
    lines += [f"- {name}: {x}" for name, x in machine.items() if name != "rehearsal"]
    for group in GROUPS:
        keys = [row.key for row in planned if row.group == group]
        done = {key: found[key] for key in keys if key in found}
        lines += ["", f"## {TITLES[group]}", "", TEXTS[group], ""]
        if done:
            lines += _TABLES[group](done)
        if len(done) < len(keys):
            lines += ["", f"{len(keys) - len(done)} of {len(keys)} rows are not measured yet."]
        lines += _reasons(done)
    return "\n".join(lines) + "\n"


def _described(group: str, x: Values) -> str:
    if FAILED in x:
        return f"FAILED: {x[FAILED]}"
    if "missing" in x:
        return x["missing"]
    if group == CHECKS:
        verdict = "right" if x["right"] else "WRONG"
        return f"{verdict}, {x['worst']} is off by {_number(x['error'])} of {x['allowed']:.1e}"
    if group == COMPILE:
        return f"{x['configurations']} configurations in {x['processes']} processes"
    if group == TRAIN:
        return f"{x['tokens_per_second']:,.0f} tokens/s, MFU {_share(x['mfu'])}"
    if group == DECODE:
        return f"{x['ms']:.2f} ms, {x['tokens_per_second']:,.0f} tokens/s"
    its = f", against {x['its_ms']:.3f} ms: {x['ratio']:.2f} times as fast" if "ratio" in x else ""
    return f"{x['ms']:.3f} ms{its}"


def _checks(done: Rows) -> list[str]:
    header = ("operation", "check", "against", "error", "allowed", "of", "verdict")
    return table(header, [[*key[1:], *_check_cells(x)] for key, x in done.items()])


def _check_cells(x: Values) -> list[str]:
    if FAILED in x or "missing" in x:
        return [NONE] * 4 + ["failed" if FAILED in x else x["missing"]]
    verdict = "right" if x["right"] else "**wrong**"
    return [x["against"], _number(x["error"]), f"{x['allowed']:.1e}", x["worst"], verdict]


def _compiling(done: Rows) -> list[str]:
    header = ("operation", "head size", "configurations", "processes", "seconds")
    return table(header, [[*key[1:], *_compiling_cells(x)] for key, x in done.items()])


def _compiling_cells(x: Values) -> list[str]:
    if FAILED in x or "missing" in x:
        return [NONE] * 3
    return [str(x["configurations"]), str(x["processes"]), f"{x[SECONDS]:.0f}"]


def _races(done: Rows) -> list[str]:
    """A row for each operation, pass and shape; a column for each rival."""
    rivals = list(dict.fromkeys(key[-1] for key in done if key[-1] != OURS))
    header = ("operation", "pass", "tokens", "head size", "batch", "supra ms", *rivals)
    rows = []
    for shape in dict.fromkeys(key[:-1] for key in done):
        ours = done.get((*shape, OURS), {})
        cells = [_race_cell(done.get((*shape, rival))) for rival in rivals]
        own = f"{ours['ms']:.3f}" if "ms" in ours else _race_cell(ours or None)
        rows.append([*shape[1:], str(ours.get("batch", NONE)), own, *cells])
    return table(header, rows)


def _race_cell(x: Values | None) -> str:
    if x is None or "missing" in x:
        return NONE
    return "failed" if FAILED in x else f"{x['its_ms']:.3f}, {x['ratio']:.2f}×"


def _training(done: Rows) -> list[str]:
    header = ("mixer", "stage", "tokens/s", "ms a step", "GFLOPs a token", "MFU", "peak GB")
    return table(header, [[*key[1:], *_training_cells(x)] for key, x in done.items()])


def _training_cells(x: Values) -> list[str]:
    if FAILED in x:
        return ["failed"] + [NONE] * 4
    cells = [
        f"{x['tokens_per_second']:,.0f}",
        f"{x['step_ms']:.1f}",
        f"{x['gflops_per_token']:.2f}",
    ]
    return [*cells, _share(x["mfu"]), f"{x['peak_gb']:.1f}"]


def _decoding(done: Rows) -> list[str]:
    header = ("rows × context", "model", "ms", "tokens/s", "state MB", "peak GB")
    return table(header, [[*key[1:], *_decoding_cells(x)] for key, x in done.items()])


def _decoding_cells(x: Values) -> list[str]:
    if FAILED in x:
        return ["failed"] + [NONE] * 3
    cells = [f"{x['ms']:.2f}", f"{x['tokens_per_second']:,.0f}"]
    return [*cells, f"{x['state_mb']:.1f}", f"{x['peak_gb']:.1f}"]


_TABLES: dict[str, Callable[[Rows], list[str]]] = {
    CHECKS: _checks,
    COMPILE: _compiling,
    OPERATION: _races,
    STEP: _races,
    TRAIN: _training,
    DECODE: _decoding,
}


def _reasons(done: Rows) -> list[str]:
    """Why cells are empty: one line for each reason."""
    missing = {x["missing"] for x in done.values() if "missing" in x}
    failed = [f"{', '.join(key[1:])}: {x[FAILED]}" for key, x in done.items() if FAILED in x]
    return _bullets("Empty columns:", sorted(missing)) + _bullets("Rows that failed:", failed)


def _bullets(title: str, lines: Iterable[str]) -> list[str]:
    lines = [f"- {line}" for line in lines]
    return ["", title, "", *lines] if lines else []


def _number(error: float | str) -> str:
    return error if isinstance(error, str) else f"{error:.1e}"


def _share(mfu: float | None) -> str:
    return NONE if mfu is None else f"{100 * mfu:.1f} %"
