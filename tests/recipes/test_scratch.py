"""Models from scratch: equal sizes, runs that are not done twice, and the table."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture
def recipe(monkeypatch):
    file = Path(__file__).parents[2] / "recipes" / "scratch.py"
    spec = importlib.util.spec_from_file_location("scratch", file)
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scratch", recipe)
    spec.loader.exec_module(recipe)
    return recipe


@pytest.fixture
def small(recipe, tmp_path, monkeypatch):
    """The recipe at toy scale, and how it runs."""
    monkeypatch.setattr(recipe, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(recipe, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(recipe, "VOCABULARY", 280)
    monkeypatch.setattr(recipe, "SIZES", recipe.SIZES | SMALL)
    changes = {"data.sequence_length": 32, "batch.size": 2, "eval.tokens": 64}
    monkeypatch.setattr(recipe, "SETTINGS", recipe.SETTINGS | changes)
    monkeypatch.setattr(recipe, "HELD_OUT_TOKENS", 128)
    (tmp_path / "page.md").write_text("<!-- from scratch -->\nold\n<!-- end of from scratch -->\n")
    for name, word in (("train", "river"), ("held_out", "bridge")):
        rows = [{"text": f"The {word} has {number} stones. " * 9} for number in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))

    def run(*words):
        texts = ["--train", tmp_path / "train.jsonl", "--held-out", tmp_path / "held_out.jsonl"]
        given = [*texts, "--runs", tmp_path / "runs", "--tokens", 128, *words]
        monkeypatch.setattr(sys, "argv", ["scratch.py", *map(str, given)])
        recipe.main()

    return run


def test_models_have_equal_numbers_of_parameters(recipe):
    """The narrower MLPs make up for what the mixers add, up to one channel per layer."""
    sizes = {name: recipe.equal_sizes(row, 4096) for name, row in recipe.ROWS.items()}
    totals = {name: recipe.count(row, sizes[name]) for name, row in recipe.ROWS.items()}
    assert sizes["softmax"]["intermediate_size"] == 512
    assert all(sizes[name]["intermediate_size"] < 512 for name in totals if name != "softmax")
    for total in totals.values():
        assert total == pytest.approx(totals["softmax"], rel=1e-3)
    assert 1e6 < totals["softmax"] - 4096 * 192 < 3e6
    assert recipe.ROWS["h3"].attention == [1, 4]


def test_rows_are_made_once_and_written_into_the_table(recipe, small, tmp_path, monkeypatch):
    small("--rows", "softmax,mamba2", "--seeds", "3")
    files = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert files == ["mamba2-128-3.json", "softmax-128-3.json"]
    result = json.loads((tmp_path / "results" / "mamba2-128-3.json").read_text())
    assert result["vocabulary"] <= 280 and result["perplexity"] > 1
    assert result["mixer_parameters"] > 0 and result["state_bytes"] > 0
    monkeypatch.setattr(recipe, "make", lambda *_: pytest.fail("made a second time"))
    small("--rows", "softmax,mamba2", "--seeds", "3")
    monkeypatch.setattr(sys, "argv", ["scratch.py", "--table"])
    recipe.main()
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[3:5]] == ["| softmax", "| mamba2"]
    assert recipe.ROWS["mamba2"].claim in lines[4]


def test_a_run_that_diverged_is_a_line_of_the_table(recipe):
    row = {"row": "h3", "seed": 0, "tokens": 10, "attention": [1, 4], "parameters": 7,
           "mixer_parameters": 2, "failed": "diverged at step 3"}  # fmt: skip
    good = row | {"seed": 1, "perplexity": 9.0, "state_bytes": 10**6, "training_seconds": 60}
    del good["failed"]
    line = recipe.table([good, row])[2]
    assert (
        "| h3, attention in 1 and 4 | 10 | 7 | 2 | diverged / 9.00 | 9.00 | 1.00 MB | 1 |" in line
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rows", "softmx"], "did you mean 'softmax'"),
        (["--tokens", "0"], "--tokens (=0) must be at least 1"),
        (["--lr", "-1"], "--lr (=-1.0) above 0"),
        (["--seeds", ""], "--seeds"),
    ],
)
def test_mistakes(small, words, says, capsys):
    with pytest.raises(SystemExit) as end:
        small(*words)
    assert end.value.code == 2 and says in capsys.readouterr().err
