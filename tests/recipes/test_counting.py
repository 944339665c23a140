"""Counting: the rows, the measurements, the committed results, and the recipe."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from supra.data.packing import IGNORE
from supra.model.attention import attention_modules

ROOT = Path(__file__).parents[2]


def load_recipe(monkeypatch):
    spec = importlib.util.spec_from_file_location("counting", ROOT / "recipes" / "counting.py")
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "counting", recipe)
    spec.loader.exec_module(recipe)
    return recipe


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The recipe with small sizes, and with its results and its page in a temporary folder."""
    recipe = load_recipe(monkeypatch)
    monkeypatch.setattr(recipe, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(recipe, "PAGE", tmp_path / "counting.md")
    (tmp_path / "counting.md").write_text(
        "above\n<!-- counting -->\nold\n<!-- end of counting -->\nbelow\n"
    )
    small = {"STEPS": 2, "BATCH": 4, "ROWS": 4, "MEASURED": 30, "BUCKETS": (0, 24, 30)}
    for name, value in (small | {"NEW_RATES": (1e-2, 3e-2)}).items():
        monkeypatch.setattr(recipe, name, value)
    return recipe


@pytest.fixture
def run(recipe, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["counting.py", *map(str, words)])
        recipe.main()

    return run


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("modulus", "tokens"), [(2, 1), (2, 7), (3, 33)])
def test_labels_are_the_ones_so_far(recipe, modulus, tokens):
    ids, labels = recipe.draw_rows(modulus, 5, tokens, generator())
    assert ids.shape == labels.shape == (5, tokens + 1)
    for row, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        assert answers[0] == IGNORE and set(row) <= {0, 1}
        assert answers[1:] == [2 + sum(row[: n + 1]) % modulus for n in range(tokens)]


def test_rows_come_from_their_seed(recipe):
    first, second, other = (recipe.draw_rows(2, 3, 20, generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("task", ["parity", "modulo3"])
def test_all_recurrences_begin_alike(recipe, task):
    """Models have the same inherited weights, decays and state sizes; only some have weights a."""
    models = {mixer: recipe.untrained(task, mixer, 1) for mixer in recipe.MIXERS}
    inherited = {
        mixer: {k: v for k, v in model.state_dict().items() if ".mixer." not in k}
        for mixer, model in models.items()
    }
    ids = torch.randint(2, (1, 5), generator=generator())
    for mixer, model in models.items():
        for name, weight in inherited[mixer].items():
            assert torch.equal(weight, inherited["linear"][name]), name
        cache = model.eval()(input_ids=ids, use_cache=True).past_key_values
        assert all(layer.state.memory.shape == (1, 2, 8, 8) for layer in cache.layers)
        for attention in attention_modules(model):
            gate = attention.mixer.decay_gate
            torch.testing.assert_close(
                gate(torch.randn(1, 3, 32)).exp(), torch.full((1, 3, 2), 0.5)
            )
    for mixer, largest in (("contracting", 0.95), ("bistable", 2.4)):
        starts = torch.stack([x.mixer.recurrence for x in attention_modules(models[mixer])])
        assert 0.95 * largest < starts.abs().max() <= largest
        assert not torch.equal(starts[0], starts[1])
        other = attention_modules(recipe.untrained(task, mixer, 2))
        assert not torch.equal(starts[0], next(iter(other)).mixer.recurrence)


def test_rows_grow_to_the_longest(recipe, monkeypatch):
    lengths = []

    def mean_loss(model, ids, labels):
        lengths.append(ids.shape[1] - 1)

    monkeypatch.setattr(recipe, "mean_loss", mean_loss)
    monkeypatch.setattr(recipe, "STEPS", 400)
    next_loss = recipe.training_losses(None, 2, generator())
    for _ in range(400):
        next_loss()
    assert lengths[0] == min(lengths) == 4 and max(lengths) == 24
    assert max(lengths[:100]) <= 14 and min(lengths[200:]) == 4 and max(lengths[200:]) == 24


def test_measuring_counts_by_place(recipe, monkeypatch):
    """A model that is given the answers is right, except at the position with a wrong answer."""
    _, labels = recipe.draw_rows(3, recipe.ROWS, 30, generator(7))
    logits = 20.0 * torch.eye(5)[labels[:, 1:]]
    logits[:, 11] = logits[:, 11].roll(1, dims=-1)
    model = recipe.untrained("modulo3", "linear", 0)
    monkeypatch.setattr(model, "forward", lambda **_: type("Output", (), {"logits": logits}))
    right, loss = recipe.measure(model, 3, 30, 7)
    assert right.tolist() == [float(place != 11) for place in range(30)]
    assert loss == pytest.approx(20 / 30, rel=1e-3)


def trial(rate, held_out=1.0, loss=0.1, accuracy=(1.0, 0.5)):
    return {
        "new_lr": rate,
        "held_out": held_out,
        "held_out_loss": loss,
        "accuracy": accuracy,
        "training_seconds": 31.4,
    }


def test_the_rate_is_chosen_on_held_out_rows(recipe):
    trials = [trial(1, held_out=0.9, accuracy=(1.0, 1.0)), trial(2, loss=0.2), trial(3)]
    assert recipe.kept({"trials": trials})["new_lr"] == 3
    assert recipe.kept({"trials": trials[:2]})["new_lr"] == 2


def test_models_are_rows(run, tmp_path, capsys):
    run("--tasks", "parity", "--mixers", "linear,bistable", "--seeds", "0,1")
    run("--tasks", "modulo3", "--mixers", "bistable", "--seeds", 3)
    folder = tmp_path / "results"
    assert sorted(x.name for x in folder.iterdir()) == [
        "modulo3-bistable-3.json", "parity-bistable-0.json", "parity-bistable-1.json",
        "parity-linear-0.json", "parity-linear-1.json",
    ]  # fmt: skip
    row = json.loads((folder / "parity-bistable-1.json").read_text())
    assert (row["task"], row["mixer"], row["seed"], row["steps"]) == ("parity", "bistable", 1, 2)
    assert [x["new_lr"] for x in row["trials"]] == [1e-2, 3e-2]
    assert all(len(x["accuracy"]) == 2 for x in row["trials"])
    assert "wrote parity-bistable-1.json: " in capsys.readouterr().out


def test_rows_are_a_page(run, tmp_path):
    """Rows are sorted by task and recurrence, in the recipe's order and not by name."""
    folder = tmp_path / "results"
    folder.mkdir()
    worse, better = trial(1e-2, held_out=0.75), trial(3e-2, accuracy=(1.0, 0.875))
    for name, trials in {
        "parity-linear-0": (worse, worse),
        "parity-bistable-1": (worse, better),
        "parity-bistable-0": (trial(1e-2), worse),
        "modulo3-bistable-0": (worse, better),
    }.items():
        task, mixer, seed = name.split("-")
        row = {"task": task, "mixer": mixer, "seed": int(seed), "trials": trials}
        (folder / f"{name}.json").write_text(json.dumps(row))
    run("--table")
    page = (tmp_path / "counting.md").read_text()
    lines = [
        "| task | recurrence | seeds | 0 to 23 | 24 to 29 | new_lr | seconds |",
        "| parity | linear | 0 | 100.0 | 50.0 | 0.01 | 31 |",
        "| parity | bistable | 0 / 1 | 100.0 / 100.0 | 50.0 / 87.5 | 0.01 / 0.03 | 31 |",
        "| modulo3 | bistable | 0 | 100.0 | 87.5 | 0.03 | 31 |",
        "| task | recurrence | 0.01 | 0.03 |",
        "| parity | bistable | 87.5, 50.0 | 87.5, 68.8 |",
    ]
    assert page.startswith("above\n") and page.endswith("below\n") and "old" not in page
    places = [page.index(f"{line}\n") for line in lines]
    assert places == sorted(places)


def test_the_committed_page_is_that_of_the_committed_results(tmp_path, monkeypatch):
    recipe = load_recipe(monkeypatch)
    committed = recipe.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(recipe, "PAGE", tmp_path / "counting.md")
    recipe.PAGE.write_text(committed, encoding="utf-8")
    recipe.write_page()
    assert recipe.PAGE.read_text(encoding="utf-8") == committed
    for task in recipe.TASKS:
        for mixer in recipe.MIXERS:
            assert f"| {task} | {mixer} | 0 / 1 / 2 |" in committed


@pytest.mark.parametrize("seed", range(3))
def test_only_bistable_states_keep_parity(monkeypatch, seed):
    """In the committed results, at positions beyond the trained length, up to 200."""
    folder = load_recipe(monkeypatch).RESULTS
    trials = {
        mixer: json.loads((folder / f"parity-{mixer}-{seed}.json").read_text())["trials"]
        for mixer in ("linear", "contracting", "bistable")
    }
    assert all(min(trial["accuracy"]) > 0.999 for trial in trials["bistable"])
    for mixer in ("linear", "contracting"):
        assert all(trial["accuracy"][-1] < 0.52 for trial in trials[mixer])


def test_what_is_there_is_not_made_again(run, tmp_path, capsys):
    words = ("--tasks", "parity", "--mixers", "linear", "--seeds", 0)
    file = tmp_path / "results" / "parity-linear-0.json"
    file.parent.mkdir()
    file.write_text("made before")
    run(*words)
    assert file.read_text() == "made before"
    assert "parity-linear-0.json exists" in capsys.readouterr().out
    run(*words, "--again")
    assert json.loads(file.read_text())["mixer"] == "linear"


def test_results_come_from_their_seed(recipe):
    first, second = (recipe.trial("parity", "bistable", 4, 1e-2) for _ in range(2))
    del first["training_seconds"], second["training_seconds"]
    assert first == second


def test_a_small_model_learns(recipe, monkeypatch):
    """Parity of up to four bits."""
    monkeypatch.setattr(recipe, "LONGEST", 4)
    monkeypatch.setattr(recipe, "STEPS", 100)
    monkeypatch.setattr(recipe, "BATCH", 32)
    monkeypatch.setattr(recipe, "ROWS", 64)
    model = recipe.untrained("parity", "bistable", 0)
    recipe.train(model, "parity", 0, 1e-2, "")
    right, loss = recipe.measure(model, 2, 4, 0)
    assert right.mean() > 0.95 and loss < 0.3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "modulo4"], "unknown task 'modulo4': did you mean 'modulo3'?"),
        (["--mixers", "bistabel"], "unknown mixer 'bistabel': did you mean 'bistable'?"),
        (["--seeds", "0,-1"], "must name seeds from 0 on"),
        (["--table"], "has no results: run without --table first"),
    ],
)
def test_mistakes(run, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        run(*words)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("results/*"))
