"""State collapse: a trained model that collapses, the committed results, and the recipe."""

import importlib.util
import json
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM

import supra
from supra.data.synthetic import RecentRecall, draw, labelled
from supra.evaluate.tasks.recall import recall_hits
from supra.long_context import StatePolicy, use_policy

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "files" / "collapse"
ROWS = 16


def load_recipe(monkeypatch):
    spec = importlib.util.spec_from_file_location("collapse", ROOT / "recipes" / "collapse.py")
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "collapse", recipe)
    spec.loader.exec_module(recipe)
    return recipe


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The recipe with small sizes, and with its results and its page in a temporary folder."""
    recipe = load_recipe(monkeypatch)
    monkeypatch.setattr(recipe, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(recipe, "PAGE", tmp_path / "long_context.md")
    (tmp_path / "long_context.md").write_text(
        "above\n<!-- collapse -->\nold\n<!-- end of collapse -->\nbelow\n"
        "<!-- native collapse -->\nolder\n<!-- end of native collapse -->\n"
    )
    long = RecentRecall(length=2 * 60)
    small = {"STEPS": 1, "NATIVE_STEPS": 1, "MORE_STEPS": 2, "BATCH": 4, "ROWS": 4, "SEGMENTS": 2}
    for name, value in (small | {"LONG": long, "BUCKETS": (0, 20, 40)}).items():
        monkeypatch.setattr(recipe, name, value)
    return recipe


@pytest.fixture
def run(recipe, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["collapse.py", *map(str, words)])
        recipe.main()

    return run


@pytest.fixture(scope="module")
def trained():
    """The base model of seed 1: `collapse.py --seeds 1 --checkpoint tests/files/collapse`."""
    return AutoModelForCausalLM.from_pretrained(DATA, dtype=torch.float32).eval()


def within_and_far(model, policy=None):
    """Accuracy in % within the trained length of 20 operations, and from the 160th on."""
    rows = draw(RecentRecall(length=960), Random("a test"), ROWS)
    operations = torch.tensor([row.queries for row in rows]) // 3
    with use_policy(model, policy):
        right = recall_hits(model, rows, batch_tokens=960 * ROWS)[1].double()
    return [100 * right[x].mean().item() for x in (operations < 20, operations >= 160)]


def test_a_trained_model_collapses_and_a_window_cures_it(trained):
    within, far = within_and_far(trained)
    assert within > 97 and far < within - 12
    window = StatePolicy(window=60)
    cured = within_and_far(trained, window)
    assert cured[0] == within, "up to its size a window holds all that was read"
    assert cured[1] > far + 10
    assert within_and_far(trained) == [within, far], "the policy is gone again"


def test_committed_results_show_collapse_and_cures(monkeypatch):
    recipe = load_recipe(monkeypatch)
    results = recipe.read_results("")
    assert [result["seed"] for result in results] == [0, 1, 2]
    for result in results:
        accuracy = {name: x["accuracy"] for name, x in result["variants"].items()}
        first, *_, last = accuracy["base"]
        assert first > 0.97 and last < first - 0.15
        for cure in ("window 60", "norm", "decay_scale 0.99", "state passing", "rows of 240"):
            assert accuracy[cure][-1] > last + 0.15
        for harm in ("window 30", "decay_scale 0.97"):
            assert accuracy[harm][0] < first - 0.01, "it forgets what it is asked for"
        assert accuracy["window 30"][-1] < accuracy["window 60"][-1] - 0.15
        assert accuracy["decay_scale 0.97"][-1] < accuracy["decay_scale 0.99"][-1] - 0.03
    native = recipe.read_results("native-")
    assert [result["seed"] for result in native] == [0, 1, 2]
    for result in native:
        accuracy = {name: x["accuracy"] for name, x in result["variants"].items()}
        first, *_, last = accuracy["base"]
        assert first > 0.97 and last < first - 0.15
        for cure in ("window 60", "norm", "decay_scale 0.99", "state passing"):
            assert accuracy[cure][-1] > last + 0.15
        assert accuracy["rows of 60"][-1] < last + 0.05, "more of the same is no cure"
    page = recipe.PAGE.read_text()
    for found in (results, native):
        assert "\n".join(recipe.table(found)) in page, "run collapse.py --table"
    pictures = recipe.PAGE.parent / recipe.PAGE.stem
    for name in ("collapse.png", "growth.png"):
        assert f"{recipe.PAGE.stem}/{name}" in page and (pictures / name).exists()


def test_a_native_seed_makes_a_result(recipe, run, tmp_path):
    run("--seeds", 3, "--native", "--checkpoint", tmp_path / "model")
    result = json.loads((tmp_path / "results" / "native-3.json").read_text())
    assert tuple(result["variants"]) == recipe.NATIVE_VARIANTS
    assert result["model"]["class"] == "Mamba2ForCausalLM"
    growth = torch.tensor(result["growth"])
    assert growth.shape == (2, 4, 2) and (growth[..., 0] == 1).all()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert type(model).__name__ == "Mamba2ForCausalLM"
    assert recipe.kept(supra.accelerate(model)) == [
        pytest.approx(heads, abs=1e-3) for heads in result["kept"]
    ]


def test_a_seed_makes_a_result(recipe, run, tmp_path):
    found = []
    for _ in range(2):
        run("--seeds", 3, "--checkpoint", tmp_path / "model")
        found.append(json.loads((tmp_path / "results" / "3.json").read_text()))
        assert found[-1].pop("minutes") >= 0
    assert found[0] == found[1]
    (result, _) = found
    for variant in result["variants"].values():
        assert len(variant["accuracy"]) == 2 and len(variant["curve"]) == 4
    growth = torch.tensor(result["growth"])
    assert growth.shape == (2, 4, 2) and (growth[..., 0] == 1).all()
    thresholds = result["variants"]["norm"]["policy"]["norm"]
    assert thresholds == result["largest_norms"]
    halves = result["variants"]["norm, half of it"]["policy"]["norm"]
    assert halves == [[x / 2 for x in heads] for heads in thresholds]
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 300_000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert recipe.kept(model) == [pytest.approx(heads, abs=1e-3) for heads in result["kept"]]


def test_results_make_a_page(recipe, run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="it draws the pictures")
    run("--seeds", 0)
    result = json.loads((tmp_path / "results" / "0.json").read_text())
    capsys.readouterr()
    other = json.loads(json.dumps(result).replace('"seed": 0', '"seed": 1'))
    other["variants"]["window 60"]["accuracy"] = [0.125, 0.5]
    (tmp_path / "results" / "1.json").write_text(json.dumps(other))
    native = json.dumps(result | {"seed": 7})
    (tmp_path / "results" / "native-7.json").write_text(native)
    run("--table")
    page = (tmp_path / "long_context.md").read_text()
    assert page.startswith("above\n") and "\nbelow\n" in page and "old" not in page
    assert "20-40 of seed 7 |" in page.partition("\nbelow\n")[2]
    assert "| 0-20 | 20-40 | 20-40 of seed 0 / 1 |" in page
    first, last = result["variants"]["window 60"]["accuracy"]
    cells = [50 * (first + 0.125), 50 * (last + 0.5)]
    row = " | ".join(["window 60", *(f"{x:.1f}" for x in cells), f"{100 * last:.1f} / 50.0"])
    assert f"| {row} |" in page
    assert all(line in page for line in capsys.readouterr().out.splitlines())
    for name in ("collapse.png", "growth.png"):
        assert (tmp_path / "long_context" / name).stat().st_size > 10_000


@pytest.mark.parametrize("native", [False, True])
def test_heads_begin_slow(recipe, native):
    """Every word has the same step size, because the weights on the hidden states are zero."""
    model = recipe.untrained(5, native)
    found = [getattr(x, "dt_bias", getattr(x, "dt", None)) for x in model.modules()]
    biases = [getattr(x, "bias", x) for x in found if x is not None]
    steps = torch.nn.functional.softplus(torch.stack(biases))
    assert steps.shape == (2, 4) and (steps > 1e-5).all() and (steps < 1e-3).all()
    assert len({*steps.flatten().tolist()}) == 8
    torch.testing.assert_close(torch.tensor(recipe.kept(model)), (-60 * steps).exp().detach())


def test_norms_are_those_of_the_states(recipe):
    model = recipe.untrained(1)
    rows = draw(RecentRecall(), Random(0), 3)
    norms = recipe.state_norms(model, rows, 7)
    assert norms.shape == (9, 2, 4), "8 pieces of 7 and one of 4"
    cache = model.eval()(input_ids=torch.tensor([row.ids for row in rows])).past_key_values
    whole = torch.stack([layer.state.memory.flatten(2).norm(dim=-1) for layer in cache.layers])
    torch.testing.assert_close(norms[-1], whole.mean(1))
    largest = recipe.state_norms(model, rows, 60, torch.amax)
    torch.testing.assert_close(largest[0], whole.amax(1))


@pytest.mark.parametrize("native", [False, True])
def test_segments_add_up_to_a_row(recipe, native):
    """State passing has the losses of one long pass, and its gradients stay within a segment."""
    model = recipe.untrained(2, native)
    (row,) = draw(RecentRecall(length=120), Random(9), 1)
    ids, labels = labelled([row])
    whole = recipe.mean_loss(model, ids, labels)
    counts = [(part > -100).sum() for part in labels.chunk(2, 1)]
    losses = recipe.passed_states(model, 1, Random(9))
    first, second = next(losses), next(losses)
    total = (counts[0] * first + counts[1] * second) / sum(counts)
    torch.testing.assert_close(total, whole)
    alone = recipe.mean_loss(model, ids[:, 60:], labels[:, 60:])
    assert (second - alone).abs() > 1e-5, "it begins from the state before it"
    first.backward()
    second.backward()  # through the first's graph it would raise


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", ""], "--seeds '' must name seeds from 0 on"),
        (["--seeds", "0,-1"], "--seeds '0,-1' must name seeds"),
        (["--seeds", "0,1", "--checkpoint", "x"], "--checkpoint saves one seed, not 2"),
        (["--table"], "has no results"),
    ],
)
def test_mistakes(run, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        run(*words)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
