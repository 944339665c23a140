"""`supra bench train`: a row of each stage on a tiny model, its parts, and what is printed."""

import json

import datasets
import pytest

from supra import testing
from supra.bench.train import report
from supra.conversion.convert import convert

PARTS = {"data", "student", "backward", "clipping", "optimizer", "rest", "teacher"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, and a student of it."""
    folder = tmp_path_factory.mktemp("train")
    testing.tiny_checkpoint(folder / "teacher", tie_word_embeddings=True)
    convert(str(folder / "teacher"), folder / "supra", mixer="supra")
    return folder


@pytest.fixture
def job(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(report, "WARM_UP", 1)
    given = (str(folder), str(folder / "teacher"), "supra")

    def make(stage, variant="plain"):
        return report.Job(*given, stage, variant, 2, 16, 1, threads=1, peak_tflops=0.1)

    return make


@pytest.mark.parametrize(
    ("stage", "variant", "parts"),
    [
        ("forward", "plain", set()),
        ("align", "plain", PARTS),
        ("distill", "unfused", PARTS | {"head and losses"}),
        ("tune", "checkpointing", PARTS - {"teacher"} | {"head and losses"}),
    ],
)
def test_a_row(job, stage, variant, parts):
    values = report.run(job(stage, variant))
    assert set(values["parts"]) == parts and all(x > 0 for x in values["parts"].values())
    assert values["tokens_per_second"] == pytest.approx(32 / values["step_ms"] * 1e3)
    speed = values["tokens_per_second"] * values["gflops_per_token"] * 1e9
    assert values["mfu"] == pytest.approx(speed / 0.1e12) and values["peak_gb"] > 0
    text = report.line(job(stage, variant), values)
    assert text.startswith(f"supra, {stage}, {variant}: ") and ("optimizer " in text) == bool(parts)


def test_every_row_is_printed_when_it_is_done(folder, monkeypatch, capsys):
    """Variants that do nothing in a stage are left out."""
    values = {"mfu": None, "parts": {}, "tokens_per_second": 1.0}
    monkeypatch.setattr(report, "measured", lambda jobs: ((job, values) for job in jobs))
    report.report(str(folder / "teacher"), mixers=["supra"], stages=["align"], as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [x["variant"] for x in lines] == ["plain", "compile", "unfused", "fp32"]
    assert {(x["mixer"], x["stage"], x["rows"]) for x in lines} == {("supra", "align", 2)}
