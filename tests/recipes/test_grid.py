"""The grid: the settings of every row are a config, and a row is made and shown in the table."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from supra import testing
from supra.evaluate.suite.parts import Settings
from supra.mixers import resolve_mixer
from supra.uptrain import load_config
from tests.evaluate.suite_sets import write_sets

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def grid(tmp_path, monkeypatch):
    grid = loaded("grid", monkeypatch)
    monkeypatch.setattr(grid, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(grid, "SMALL", grid.SMALL | {"data.sequence_length": 32, "eval.tokens": 64})
    monkeypatch.setattr(grid, "CONTEXT", 64)
    monkeypatch.setattr(grid, "SUITE", Settings(shots=(0, 2), limit=4, sequence_length=64))
    monkeypatch.setattr(grid, "SUITE_PARTS", ("wikitext", "in_context"))
    return grid


@pytest.fixture
def tables(tmp_path, monkeypatch):
    tables = loaded("grid_tables", monkeypatch)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text(
        "above\n<!-- grid -->\nold\n<!-- end of grid -->\n"
        "<!-- abilities -->\nold\n<!-- end of abilities -->\nbelow\n"
    )
    kept = {"16 shots": "in_context 2 shots", "WikiText": "wikitext perplexity", "none": "none"}
    monkeypatch.setattr(tables, "KEPT", kept)
    return tables


def loaded(name, monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)  # as for a script, which may import its neighbours
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, recipe)
    spec.loader.exec_module(recipe)
    return recipe


@pytest.fixture
def run(grid, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["grid.py", *map(str, words)])
        grid.main()

    return run


@pytest.mark.parametrize("budget", [300_000, 1_000_000])
def test_every_rows_settings_are_a_config(grid, budget):
    for name, row in grid.ROWS.items():
        resolve_mixer(row.mixer, row.options)
        file = RECIPES / "configs" / f"{row.recipe}.yaml"
        text = grid.sources_of(row, SimpleNamespace(train="d", written="w"))
        settings = grid.SMALL | row.overrides | text | {
            "student": "s", "out": "o", "data.eval_path": "e",
            "budget.share": None, "budget.tokens": budget,
        }  # fmt: skip
        if (yaml.safe_load(file.read_text()) | row.overrides).get("distill"):
            settings["teacher"] = "t"
        config = load_config(file, [f"{key}={json.dumps(x)}" for key, x in settings.items()])
        assert sum(config.stage_tokens.values()) == budget, name


def test_a_row_is_made_and_shown(run, tables, tmp_path, monkeypatch, capsys):
    testing.tiny_checkpoint(tmp_path / "teacher")
    with open(tmp_path / "text.jsonl", "w") as file:
        for number in range(60):
            print(json.dumps({"text": f"The river rises {number} times. " * 9}), file=file)
    words = ["--teacher", tmp_path / "teacher", "--runs", tmp_path / "runs", "--tokens", 512]
    words += ["--train", tmp_path / "text.jsonl", "--held-out", tmp_path / "text.jsonl"]
    run("gated", *words)
    run("window", *words)
    testing.tiny_checkpoint(tmp_path / "other", seed=1)
    (tmp_path / "more.jsonl").write_text((tmp_path / "text.jsonl").read_text())
    for changed, message in (
        (["--teacher", tmp_path / "other"], "were made with other settings"),
        (["--train", tmp_path / "more.jsonl"], "holds a run with another config"),
        (["--held-out", tmp_path / "more.jsonl"], "holds a run with another config"),
    ):
        with pytest.raises(SystemExit):
            run("gated", *words, *changed)
        assert message in capsys.readouterr().err
    run("teacher_tuned", *words)
    row = json.loads((tmp_path / "results" / "gated-512-0.json").read_text())
    assert row["ratio"] == pytest.approx(row["perplexity"] / row["teacher_perplexity"])
    assert {"teacher", "converted", "calibrate", "align", "distill"} <= set(
        row["perplexity_by_stage"]
    )
    assert row["softmax_layers"] == [] and row["floors"] == []
    assert row["training_seconds"] >= 0
    floors = json.loads((tmp_path / "results" / "window-512-0.json").read_text())["floors"]
    assert [x["name"] for x in floors] == ["intact", "linear only", "window only", "no mixing"]
    sets = write_sets(tmp_path / "sets")
    run("window", *words, "--suite", sets, "--tasks", "in_context")  # trained already
    suite = json.loads((tmp_path / "results" / "window-512-0.json").read_text())["suite"]
    assert all(title.startswith("in_context") for title in suite)
    run("window", *words, "--suite", sets)
    suite = json.loads((tmp_path / "results" / "window-512-0.json").read_text())["suite"]
    wikitext = suite["wikitext perplexity"]
    assert wikitext["kept"] == pytest.approx(wikitext["teacher"] / wikitext["model"])
    monkeypatch.setattr(sys, "argv", ["grid_tables.py"])
    tables.main()
    table = (tmp_path / "page.md").read_text()
    assert table.startswith("above\n")
    assert table.endswith("below\n")
    assert "old" not in table
    assert f"| gated | supra | gated | 0 | 512 | {row['ratio']:.3f} |" in table
    assert f"| window | 512 | — | {1 / wikitext['kept']:.2f} | — | all | 0 |" in table


def test_a_row_without_its_text_is_refused(run, capsys):
    with pytest.raises(SystemExit) as exit_:
        run("gated", "--teacher", "t", "--train", "x")
    assert exit_.value.code == 2
    assert "--held-out is missing" in capsys.readouterr().err


def test_a_missing_evaluation_set_is_named_before_training(run, tmp_path, capsys):
    words = ["--teacher", "t", "--train", "x", "--held-out", "y", "--suite", tmp_path]
    with pytest.raises(SystemExit) as exit_:
        run("gated", *words)
    assert exit_.value.code == 2
    assert "has no file for wikitext" in capsys.readouterr().err
