"""The log of a run: what a line of a step has."""

import json
from types import SimpleNamespace

import pytest
import torch

from supra.uptrain.log import Log
from supra.uptrain.run_log import RunLog


def opened(path, **options):
    accelerator = SimpleNamespace(
        is_main_process=True, device=torch.device("cpu"), log=lambda values, step: None
    )
    return Log(accelerator, RunLog(path), tokens=300, tokens_done=0, **options)


def test_mfu_is_the_share_of_the_peak(tmp_path):
    """A token of tune takes twice the time of one of align; both are far from the peak."""
    log = opened(tmp_path / "log.jsonl", seconds={"align": 1e-6, "tune": 2e-6})
    log.step(1, "align", 100, {"loss": 1.0})
    log.step(2, "tune", 200, {"loss": 1.0})
    log.close()
    first, second = map(json.loads, (tmp_path / "log.jsonl").open())
    assert first["mfu"] == pytest.approx(first["tokens_per_second"] * 1e-6, abs=1e-4)
    assert second["mfu"] == pytest.approx(second["tokens_per_second"] * 2e-6, abs=1e-4)
    assert first["mfu"] > 0


def test_without_a_peak_there_is_no_mfu(tmp_path):
    log = opened(tmp_path / "log.jsonl")
    log.step(1, "align", 100, {"loss": 1.0})
    log.close()
    assert "mfu" not in json.loads((tmp_path / "log.jsonl").read_text())


def test_seconds_of_the_training(tmp_path):
    """Tokens between steps over their speed. Evaluations do not count."""
    lines = [
        {"step": 0, "eval_loss": 3.0},
        {"step": 1, "tokens": 100, "tokens_per_second": 50.0},
        {"step": 1, "eval_loss": 2.0},
        {"step": 2, "tokens": 200, "tokens_per_second": 25.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert RunLog(tmp_path / "log.jsonl").training_seconds() == 2 + 4
