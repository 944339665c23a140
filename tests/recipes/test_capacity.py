"""State capacity: the rows, the search for the threshold, the laws, and a run from end to end."""

import importlib.util
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from supra.data.packing import IGNORE
from supra.evaluate.tasks import heat_map

SIZES = [64, 128, 256, 512, 1024]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    file = Path(__file__).parents[2] / "recipes" / "capacity.py"
    spec = importlib.util.spec_from_file_location("capacity", file)
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "capacity", recipe)
    spec.loader.exec_module(recipe)
    monkeypatch.setattr(recipe, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(recipe, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(recipe, "BATCH_WORDS", 64)
    monkeypatch.setattr(recipe, "TEST_ROWS", 4)
    (tmp_path / "page.md").write_text(
        "above\n<!-- capacity -->\nold\n<!-- end of capacity -->\nbelow\n"
    )
    return recipe


@pytest.fixture
def run(recipe, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["capacity.py", *map(str, words)])
        recipe.main()

    return run


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("facts", [1, 2, 7, 33, 64])
def test_rows_state_what_they_ask(recipe, facts):
    ids, labels = recipe.draw_rows(facts, 5, generator())
    asked, context = min(facts, recipe.ASKED), 3 * facts
    assert ids.shape == labels.shape == (5, context + asked + 1)
    least, most = recipe.KEYS, recipe.KEYS + recipe.VALUES
    for row, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        stated = {word: after for word, after in pairwise(row[:context]) if word < least}
        assert len(stated) == facts, "no key comes twice"
        assert all(least <= value < most for value in stated.values())
        assert sum(word >= most for word in row[:context]) == facts, "as many words of filler"
        questions = row[context:-1]
        assert len(set(questions)) == asked
        assert [stated[key] for key in questions] == answers[context + 1 :]
        assert set(answers[: context + 1]) == {IGNORE}


def test_rows_come_from_their_seed(recipe):
    first, second, other = (recipe.draw_rows(9, 3, generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_facts_stand_anywhere(recipe):
    ids, _ = recipe.draw_rows(4, 400, generator())
    starts = (ids[:, :12] < recipe.KEYS).float().mean(0)
    assert starts[:11].min() > 0.2 and starts[11] == 0


@pytest.mark.parametrize("heads", [1, 4, 16])
def test_models_differ_in_their_state(recipe, heads):
    model = recipe.untrained(heads, 0)
    assert recipe.state_size(model) == recipe.WIDTH**2 / heads
    parameters = sum(x.numel() for x in model.parameters())
    assert parameters == pytest.approx(18_300, rel=0.02)
    other = recipe.untrained(heads, 1)
    convolution = "model.layers.0.self_attn.mixer.conv.weight"
    assert not torch.equal(*(dict(x.named_parameters())[convolution] for x in (model, other)))


def test_recall_counts_answers(recipe, monkeypatch):
    """An untrained model guesses; a model that is given the answers is right."""
    monkeypatch.setattr(recipe, "TEST_ROWS", 64)
    model = recipe.untrained(4, 0)
    assert recipe.recall(model, 16) == pytest.approx(1 / recipe.VALUES, abs=0.05)
    _, labels = recipe.draw_rows(16, 64, generator(16))
    answers = recipe.shifted_labels(labels)
    answers = answers[answers != IGNORE]
    monkeypatch.setattr(model, "get_output_embeddings", lambda: lambda _: torch.eye(96)[answers])
    assert recipe.recall(model, 16) == 1


def test_the_climb_ends_below_the_threshold(recipe):
    asked = []

    def measure(facts):
        asked.append(facts)
        return 1.0 if facts < 5 else 0.96 if facts < 10 else 0.9

    curve = recipe.climb(measure)
    assert asked == [1, 2, 3, 4, 5, 6, 7, 8, 10] and list(curve) == asked
    found = recipe.crossing(curve)
    assert found == pytest.approx(8 * (10 / 8) ** (0.01 / 0.06), abs=1e-3)
    assert recipe.crossing(recipe.climb(lambda _: 1.0)) is None
    assert recipe.crossing(recipe.climb(lambda _: 0.5)) == 0
    assert recipe.crossing({1: 0.95, 2: 0.0}) == 1


@pytest.mark.parametrize(
    ("law", "capacity"),
    [
        ("linear", lambda size: 2 + 0.03 * size),
        ("exponential", lambda size: 3 * (1.003**size - 1)),
        ("power", lambda size: 0.5 * size**0.6),
    ],
)
def test_laws_are_found(recipe, law, capacity):
    first, *others = recipe.fit_laws(SIZES, [capacity(size) for size in SIZES])
    assert first.name == law and first.error < 0.02
    assert all(x.error > 10 * first.error for x in others)
    for size in (*SIZES, 700):
        assert first.at(size) == pytest.approx(capacity(size), rel=0.02, abs=0.05)


def test_the_error_is_a_root_mean_square(recipe):
    (linear,) = (x for x in recipe.fit_laws([1, 1, 2, 2], [1, 3, 2, 4]) if x.name == "linear")
    assert linear.error == pytest.approx(1) and linear.at(3) == pytest.approx(4)
    assert linear.formula == "1.00 + 1 N"


@pytest.mark.parametrize("sizes", [SIZES, SIZES * 3])
def test_least_squares_are_least(recipe, sizes):
    """No law with slightly different parameters is closer to the points."""
    noise = torch.rand(len(sizes), generator=generator()).tolist()
    capacities = [1 + size**0.5 * x for size, x in zip(sizes, noise, strict=True)]

    def error(at):
        return math.dist(map(at, sizes), capacities) / len(sizes) ** 0.5

    for law in recipe.fit_laws(sizes, capacities):
        assert law.error == pytest.approx(error(law.at))
        for factor in (0.99, 1.01):
            assert error(lambda size, law=law, f=factor: f * law.at(size)) > law.error


def test_models_are_rows_and_a_page(run, tmp_path, capsys):
    run("--heads", "8,4,2", "--seeds", "0,1", "--steps", 2)
    folder = tmp_path / "results"
    assert sorted(x.name for x in folder.iterdir()) == [
        "2-0.json", "2-1.json", "4-0.json", "4-1.json", "8-0.json", "8-1.json",
    ]  # fmt: skip
    row = json.loads((folder / "4-1.json").read_text())
    assert (row["state"], row["heads"], row["head_size"], row["steps"]) == (256, 4, 8, 2)
    assert row["capacity"] == row["length"] == 0 and list(row["curve"]) == ["1"]
    capsys.readouterr()
    for file in folder.iterdir():  # as if they had been trained
        row = json.loads(file.read_text())
        facts = row["state"] / 32 + row["seed"]
        file.write_text(json.dumps(row | {"capacity": facts, "length": 3 * facts}))
    run("--table")
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("above\n") and page.endswith("below\n") and "old" not in page
    assert "| 128 | 8 of 4 × 4 | 4.5 | 0: 4.0 / 1: 5.0 | 14 | 28 |" in page
    assert page.index("| 128 |") < page.index("| 256 |") < page.index("| 512 |")
    assert "| linear | 0.50 + 0.03125 N | 0.50 |" in page
    assert (tmp_path / "page" / "capacity.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_for_what_fails(recipe, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "LR", 1e30)
    run("--heads", 4, "--seeds", 0, "--steps", 3)
    assert (
        "diverged at step" in json.loads((tmp_path / "results" / "4-0.json").read_text())["failed"]
    )
    assert "| 0: diverged |" in capsys.readouterr().out
    row = {"state": 64, "heads": 16, "head_size": 2, "seed": 1, "minutes": 1, "capacity": None}
    assert "1: over 64" in recipe.table([row])[-1]


def test_a_small_model_learns(recipe, monkeypatch):
    """With two values, half of the answers are right by chance."""
    for name, value in (("KEYS", 4), ("VALUES", 2), ("FILLERS", 1), ("MAX_FACTS", 4)):
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe, "BATCH_WORDS", 512)
    monkeypatch.setattr(recipe, "TEST_ROWS", 64)
    model = recipe.untrained(4, 0)
    recipe.train(model, 60, 0)
    assert recipe.recall(model, 1) > 0.9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heads", 3], "--heads (=3) must divide the width of 32"),
        (["--heads", 0], "--heads (=0) must divide"),
        (["--heads", ""], "--heads must have at least one number"),
        (["--seeds", "0,-1"], "seeds from 0 on"),
        (["--steps", 0], "--steps (=0) must be at least 1"),
        (["--table"], "fewer than three sizes"),
    ],
)
def test_mistakes(run, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        run(*words)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("results/*"))


def test_without_matplotlib(run, capsys, monkeypatch):
    monkeypatch.setattr(heat_map, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        run("--table")
    assert "pip install matplotlib" in capsys.readouterr().err
