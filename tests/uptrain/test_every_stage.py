"""Every stage with every launch file on two and four ranks, against one process."""

import json
import random

import pytest

from supra.testing import tiny_tokenizer
from supra.uptrain import load_config, train
from tests.uptrain.test_launch import (
    HERE,
    LAUNCH,
    LENGTH,
    PER_STEP,
    check_same,
    launched,
    logged,
    run_ranks,
    settings,
)
from tests.uptrain.test_launch import files as files  # a fixture: a layer of every mixer

pytestmark = pytest.mark.long  # ten seconds each

STEPS = 2
STAGES = {
    "orient": "",
    "align": ", target: output",
    "distill": "",
    "tune": "",
    "extend": f", state_passing: 2, initial_state: zero, sequence_length: {LENGTH // 2}",
}
LORA = ("distill", "tune", "extend")
RANKS = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]


@pytest.fixture(scope="module")
def text(files, tmp_path_factory):
    """A document for each row, as long as a row."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    tokenizer, letters = tiny_tokenizer(files / "student"), random.Random(1)
    texts = ["".join(letters.choices("JKQVXYZ", k=LENGTH - 1)) for _ in range(STEPS * PER_STEP)]
    assert all(len(tokenizer(x)["input_ids"]) == LENGTH - 1 for x in texts)
    path.write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
    return path


def arguments(files, text, out, ranks, stage, lora):
    """Steps of one stage. Passes have one row, since align's error is relative to its rows."""
    own = [f"{stage}={{tokens: {STEPS * PER_STEP * LENGTH}{STAGES[stage]}}}", "budget={}"]
    own += ["tune=null"] * (stage != "tune") + ["lora={rank: 2}"] * lora
    own += [f"teacher={files}/base"] * (stage == "distill")
    own += [f"data.path={text}", f"data.eval_path={text}", f"eval={{every: 1, tokens: {LENGTH}}}"]
    return [*settings(files, out, 1, PER_STEP // ranks), *own]


@pytest.fixture(scope="module")
def one_process(files, text, tmp_path_factory):
    """What one process makes of a stage."""
    done = {}

    def run(stage, lora):
        if (stage, lora) not in done:
            out = tmp_path_factory.mktemp(stage) / "run"
            first, *others = arguments(files, text, out, 1, stage, lora)
            assert train(load_config(first.removeprefix("--config="), others))
            done[stage, lora] = out
        return done[stage, lora]

    return run


@pytest.mark.parametrize(
    ("stage", "lora"), [*((x, False) for x in STAGES), *((x, True) for x in LORA)]
)
@pytest.mark.parametrize(("name", "ranks"), RANKS)
def test_ranks_train_as_one_process(
    files, text, one_process, tmp_path, stage, lora, name, ranks
):  # fmt: skip
    name, run = f"{name}.yaml", tmp_path / "run"
    environment = launched(LAUNCH / name, f"--num_processes={ranks}", *HERE.get(name, ()))
    given = arguments(files, text, run, ranks, stage, lora)
    assert run_ranks(given, environment, ranks) == [0] * ranks
    check_same(run, one_process(stage, lora), STEPS)
    assert [line["stage"] for line in logged(run) if "tokens" in line] == [stage] * STEPS
