"""Bad input over all commands: one error line and exit code 2, or the reason why it is accepted.

Each case runs in a child of this process. `make test-faults` runs them all.
"""

import importlib
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.case import Case
from tests.faults.runner import Outcome, run_command, run_forked, snapshot, words_of
from tests.faults.shared import build, places
from tests.faults.table import CASES

MODULES = (
    "supra.cli.app", "supra.conversion.convert", "supra.conversion.inspection",
    "supra.conversion.untrained",
    "supra.planning.plan", "supra.planning.settings",
    "supra.export.export", "supra.export.gguf.export",
    "supra.serving.generation", "supra.serving.http", "supra.serving.sampling",
    "supra.uptrain.loop", "supra.evaluate.ablate.ablation", "supra.evaluate.tasks.task",
    "supra.evaluate.tasks.passkey", "supra.long_context.diagnosis", "supra.bench.kernels",
    "supra.bench.parallel", "supra.bench.decode", "gguf", "peft", "pyarrow.parquet",
)  # fmt: skip
# what a run that begins writes before it looks at its models
BEGUN = {"config.yaml", "log.jsonl"}


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """What the cases share; and all modules are imported, for their processes to inherit."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in MODULES:
        importlib.import_module(name)
    folder = tmp_path_factory.mktemp("shared")
    outcome = run_forked(lambda: build(folder), folder, seconds=120)
    assert outcome.code == 0, outcome.err
    return folder


def test_the_table_is_large_and_its_names_are_names():
    assert len(CASES) >= 300
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fault(case, common, tmp_path):
    here = tmp_path / "case"
    here.mkdir()
    if case.make is not None:
        case.make(here, common)
    before = snapshot(here)
    outcome = run_command(words_of(case.command, places(common, here)), here)
    try:
        check(case, outcome, before, here)
    finally:
        shutil.rmtree(here)


def check(case: Case, outcome: Outcome, before: dict[str, str], here: Path) -> None:
    said = outcome.err[-3000:]
    assert not outcome.timed_out, f"no answer\n{said}"
    assert "Traceback" not in outcome.err, said
    if case.accepted is not None:
        assert outcome.code == 0, said
        assert not list(here.rglob("*.partial"))
        return
    assert outcome.code == 2, f"exit code {outcome.code}\n{outcome.out[-500:]}\n{said}"
    assert len(outcome.errors) == 1, said
    line = outcome.errors[0].lower()
    for parts in case.says:
        assert any(part.lower() in line for part in ([parts] if isinstance(parts, str) else parts))
    after = snapshot(here)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {name for name in changed if Path(name).name not in BEGUN} == set()
