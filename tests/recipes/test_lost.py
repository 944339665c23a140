"""The picture of where recall is lost: the rows it names, and the rows that it finds."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def loaded(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, recipe)
    spec.loader.exec_module(recipe)
    return recipe


@pytest.fixture
def lost(tmp_path, monkeypatch):
    lost = loaded("lost", monkeypatch)
    monkeypatch.setattr(lost, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(lost, "PICTURE", tmp_path / "docs" / "results" / "lost.png")
    monkeypatch.setattr(sys, "argv", ["lost.py", "--tokens", "2048"])
    lost.RESULTS.mkdir()
    lost.PICTURE.parent.parent.mkdir()
    return lost


def write(lost, row, tokens, kept):
    measures = {title: {"kept": kept, "kept_standard_error": 0.1} for title in lost.SHOWN}
    (lost.RESULTS / f"{row}-{tokens}-0.json").write_text(json.dumps({"suite": measures}))


def test_its_rows_are_rows_of_the_grid(lost, monkeypatch):
    rows = loaded("grid", monkeypatch).ROWS
    named = [row for places in lost.AXES.values() for row, *_ in places.values()]
    assert set(named) <= set(rows)


def test_what_was_measured_is_drawn(lost, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    write(lost, "gated_deltanet", lost.STEP, 0.25)
    write(lost, "gated_deltanet", 2048, 0.5)
    write(lost, "window_256", 2048, 0.75)
    (lost.RESULTS / "window-2048-0.json").write_text("{}")  # without --suite
    lost.main()
    said = capsys.readouterr().out
    assert "calibrated: LAMBADA 25%, in context, 16 shots 25%" in said
    assert said.count("LAMBADA 50%") == 2  # on the axes of training and channels
    assert "256: LAMBADA 75%" in said and "64: LAMBADA 75%" not in said
    assert lost.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_without_rows_nothing_is_drawn(lost, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    with pytest.raises(SystemExit) as exit_:
        lost.main()
    assert exit_.value.code == 2
    assert "has no row of the picture" in capsys.readouterr().err
    assert not lost.PICTURE.exists()
