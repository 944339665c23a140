"""The synthetic languages: their rows, how models are scored, and training on them."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

from supra import testing
from supra.cli import main
from supra.data.packing import IGNORE, shifted_labels
from supra.data.synthetic import (
    LANGUAGES,
    MARKS,
    AssociativeRecall,
    Induction,
    MultiQueryRecall,
    RecentRecall,
    draw,
    labelled,
)
from supra.errors import UserError
from supra.evaluate.tasks import task as task_module
from supra.evaluate.tasks.recall import recall_accuracy

LANGUAGE_GRID = [
    Induction(),
    Induction(length=3, vocabulary=4),
    AssociativeRecall(),
    AssociativeRecall(length=40, vocabulary=20),
    AssociativeRecall(length=2, vocabulary=7),
    MultiQueryRecall(),
    MultiQueryRecall(length=64, vocabulary=129, pairs=16),
    MultiQueryRecall(length=36, vocabulary=18, pairs=9),
    RecentRecall(),
    RecentRecall(length=303, vocabulary=13, recent=3),
    RecentRecall(length=6, vocabulary=6, recent=1),
]
each_language = pytest.mark.parametrize("language", LANGUAGE_GRID, ids=repr)


def some_rows(language, count=200, seed=0):
    return draw(language, Random(seed), count)


class Fake:
    """A model whose next word is `answer(row up to here)`."""

    def parameters(self):
        return iter(())

    def named_modules(self):
        return ()

    def __init__(self, answer, vocabulary):
        self.answer, self.vocabulary = answer, vocabulary

    def __call__(self, input_ids, **_):
        said = [
            [self.answer(row[: at + 1]) for at in range(len(row))] for row in input_ids.tolist()
        ]
        return SimpleNamespace(
            logits=torch.nn.functional.one_hot(torch.tensor(said), self.vocabulary).float()
        )


def last_follower(read):
    """The word that followed the last word at its previous occurrence."""
    before = [at for at, word in enumerate(read[:-1]) if word == read[-1]]
    return read[before[-1] + 1] if before else 0


@each_language
def test_rows_answer_themselves(language):
    rows = some_rows(language, 40)
    assert rows == some_rows(language, 40) != some_rows(language, 40, seed=1)
    assert len({len(row.ids) for row in rows}) == 1
    oracle = Fake(last_follower, language.vocabulary)
    assert recall_accuracy(oracle, rows) == (1, 1)
    for row in rows:
        assert len(row.values) == language.candidates
        assert all(row.ids[at + 1] in row.values for at in row.queries)
        assert set(row.ids) <= set(range(language.vocabulary))


@each_language
def test_a_guess_among_the_values_is_at_chance(language):
    rows, generator = some_rows(language, 4000), Random(3)
    hits = [generator.choice(row.values) == row.ids[at + 1] for row in rows for at in row.queries]
    chance = 1 / language.candidates
    deviation = (chance * (1 - chance) / len(hits)) ** 0.5
    assert sum(hits) / len(hits) == pytest.approx(chance, abs=4 * deviation)


def test_chances_are_the_papers():
    assert AssociativeRecall().candidates == 4  # 25%, the random row of H3's table
    assert Induction().candidates == 18  # 5.6%; 5% there, a guess among 20
    assert MultiQueryRecall().candidates == 4


def test_induction_as_published():
    language = Induction()
    mark, dot = language.vocabulary - MARKS, language.vocabulary - 1
    places = Counter()
    for row in some_rows(language, 2000):
        assert len(row.ids) == 32 and row.queries == [30] and row.ids[30] == mark
        assert row.ids.count(mark) == 2 and dot not in row.ids
        places[row.ids.index(mark)] += 1
    assert set(places) == set(range(28)), "the answer never is the last word before the mark"


def test_associative_recall_as_published():
    language = AssociativeRecall()
    reused = False
    for row in some_rows(language, 500):
        keys, values = row.ids[:20:2], row.ids[1:20:2]
        assert set(keys) <= set(range(4)) and set(values) <= set(range(4, 8))
        assert len(set(zip(keys, values, strict=True))) == len(set(keys)), "a key has one value"
        assert row.ids[20] == 8 and row.ids[21] in keys and row.queries == [21]
        assert len(row.ids) == 23 and 9 not in row.ids and row.values == [4, 5, 6, 7]
        reused |= len(set(values)) < len(set(keys))
    assert reused, "two keys may have the same value"


def test_multi_query_recall_as_published():
    language = MultiQueryRecall(length=256, vocabulary=512, pairs=16)
    gaps = Counter()
    for row in some_rows(language, 100):
        keys, values = row.ids[:32:2], row.ids[1:32:2]
        assert len({*keys, *values}) == 32 and values == row.values
        assert max(keys) < 256 <= min(values)
        assert sorted(row.ids[at] for at in row.queries) == sorted(keys)
        assert all(at >= 32 and at % 2 == 0 for at in row.queries)
        others = set(range(32, 256)) - set(row.queries)
        assert not {row.ids[at] for at in others} & set(keys), "each key is asked for once"
        gaps.update((at - 32) // 2 for at in row.queries)
    near, far = (sum(gaps[x] for x in some) for some in (range(16), range(96, 112)))
    assert near > 4 * far


def test_pairs_may_fill_the_row():
    for row in some_rows(MultiQueryRecall(length=20, vocabulary=10, pairs=5)):
        assert sorted(row.queries) == [10, 12, 14, 16, 18]
        pairs = list(zip(row.ids[::2], row.ids[1::2], strict=True))
        assert sorted(pairs[:5]) == sorted(pairs[5:])


def test_within_the_trained_length_nothing_is_forgotten():
    """In rows of the trained length no key has two values; after 24 writes, every write replaces
    one."""
    language = RecentRecall(length=960)
    *_, write, ask = range(language.vocabulary)
    kinds = Counter()
    for row in some_rows(language, 50):
        operations = list(zip(*[iter(row.ids)] * 3, strict=True))
        kinds.update(mark for mark, _, _ in operations)
        keys = [key for mark, key, _ in operations if mark == write]
        assert len({*keys[:24]}) == 24 and all(
            a == b for a, b in zip(keys, keys[24:], strict=False)
        )
        first = [key for mark, key, _ in operations[:20] if mark == write]
        assert len({*first}) == len(first)
        assert operations[0][0] == write
    assert kinds == {write: 50 * 160, ask: 50 * 160}


def test_questions_are_about_the_last_writes():
    for row in some_rows(RecentRecall(length=960), 20):
        written, ages = [], Counter()
        for mark, key, value in zip(*[iter(row.ids)] * 3, strict=True):
            if mark == 48:
                written.append((key, value))
            else:
                ages[len(written) - written.index((key, value), max(0, len(written) - 8))] += 1
        assert {*ages} == {*range(1, 9)} and row.queries[0] // 3 == row.ids[::3].index(49)


@pytest.mark.parametrize(
    ("language", "sizes", "message"),
    [
        (Induction, {"length": 2}, r"length \(=2\) must be at least 3: one word"),
        (Induction, {"vocabulary": 3}, r"vocabulary \(=3\) must be at least 4"),
        (AssociativeRecall, {"length": 21}, r"length \(=21\) must be even"),
        (AssociativeRecall, {"vocabulary": 5}, r"vocabulary \(=5\) must be at least 6"),
        (MultiQueryRecall, {"pairs": 0}, r"pairs \(=0\) must be at least 1"),
        (MultiQueryRecall, {"pairs": 17}, r"length \(=64\) must be at least 68: each of the 17"),
        (MultiQueryRecall, {"vocabulary": 7}, r"vocabulary \(=7\) must be at least 8"),
        (RecentRecall, {"length": 3}, r"length \(=3\) must be at least 6: a write and"),
        (RecentRecall, {"length": 64}, r"length \(=64\) must be a multiple of 3"),
        (RecentRecall, {"recent": 0}, r"recent \(=0\) must be at least 1"),
        (RecentRecall, {"vocabulary": 17}, r"vocabulary \(=17\) must be at least 18: 8 keys"),
    ],
)
def test_no_room(language, sizes, message):
    with pytest.raises(UserError, match=message):
        language(**sizes)


@each_language
def test_labels_are_the_answers(language):
    rows = some_rows(language, 5)
    ids, labels = labelled(rows)
    shifted = shifted_labels(labels)
    for row, some, label in zip(rows, ids.tolist(), shifted, strict=True):
        assert some == row.ids
        assert (label != IGNORE).nonzero().flatten().tolist() == sorted(row.queries)
        assert all(label[at] == row.ids[at + 1] for at in row.queries)
    assert torch.equal(*labelled(rows, every_token=True))


def test_rows_start_after_other_tokens():
    row = Induction().example(range(20), Random(0))
    moved = row.after([7, 8])
    assert moved.ids == [7, 8, *row.ids] and moved.queries == [32]
    assert row.after([]) == row


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetics")
    testing.tiny_checkpoint(folder / "model")
    return folder


def evaluate(capsys, models, *words):
    main(["eval", "task", "--model", str(models / "model"), *map(str, words)])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "chance"),
    [
        ("induction", "0.056"),
        ("associative-recall", "0.250"),
        ("mqar", "0.250"),
        ("recent-recall", "0.042"),
    ],
)
def test_eval(models, capsys, task, chance):
    words = ["--task", task, "--lengths", "66,36", "--samples", 5]
    words += ["--pairs", 4] if task == "mqar" else []
    printed = evaluate(capsys, models, *words)
    first, _, *lengths = printed.splitlines()
    assert f"on {task}: " in first
    assert len(lengths) == 2 and all(line.endswith(chance) for line in lengths)
    found = json.loads(evaluate(capsys, models, *words, "--json"))
    assert found["task"] == task and found["samples"] == 5
    assert [x["length"] for x in found["results"]] == [66, 36]
    for result in found["results"]:
        assert 0 <= result["exact"] <= result["among_values"] <= 1
        assert f"{result['chance']:.3f}" == chance
    assert json.loads(evaluate(capsys, models, *words, "--json")) == found
    assert json.loads(evaluate(capsys, models, *words, "--json", "--seed", 1))["seed"] == 1


@pytest.mark.parametrize("task", LANGUAGES)
def test_eval_of_one_that_looks_up(models, monkeypatch, capsys, task):
    oracle = Fake(last_follower, testing.VOCABULARY)
    monkeypatch.setattr(task_module, "load_model", lambda *_: oracle)
    found = json.loads(evaluate(capsys, models, "--task", task, "--lengths", "66,84", "--json"))
    assert all((x["among_values"], x["exact"]) == (1, 1) for x in found["results"])
    assert len(found["results"]) == (4 if task == "mqar" else 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "inducton"], "unknown --task 'inducton': did you mean 'induction'?"),
        (["--task", "induction", "--pairs", "4"], "--pairs is only for mqar"),
        (["--task", "induction", "--samples", "0"], "--samples (=0) must be at least 1"),
        (["--task", "induction", "--lengths", "x"], "--lengths 'x' must be integers"),
        (["--task", "induction", "--lengths", "2"], "length (=2) must be at least 3"),
        (["--task", "mqar", "--vocabulary", "0"], "vocabulary (=0) must be at least 8"),
        (["--task", "induction", "--vocabulary", "301"], "needs 301 words, but the tokenizer"),
        (["--task", "mqar", "--text", "x"], "--text: it belongs to supra eval text and supra eval"),
        (["--task", "mqar", "--parts", "recall"], "--parts: it belongs to supra eval ablate"),
        (["--task", "mqar", "--batch", "8"], "--batch: it belongs to supra eval text and supra"),
        ([], "--task is missing: supra eval task needs --task TASK"),
    ],
)
def test_mistakes_of_eval(models, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "task", "--model", str(models / "model"), *words])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def small_config(**sizes):
    return testing.tiny_config("llama", vocab_size=20, hidden_size=12, head_dim=4, **sizes)


@pytest.mark.parametrize("mixer", ["softmax", "supra", "gated_delta", "window"])
def test_the_future_has_no_gradient(mixer):
    model = testing.untrained_model(small_config(), mixer, seed=3)
    assert testing.future_gradient(model, 37) == 0
    assert {x.name for x in model.modules() if hasattr(x, "mix")} == {mixer}


def test_a_leak_is_seen():
    model = testing.untrained_model(small_config(), "softmax")
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: output + 1e-3 * inputs[0].roll(-1, 1)
    )
    assert testing.future_gradient(model, 16) > 1e-4


def test_a_seed_makes_a_model():
    first, again, other = (
        testing.untrained_model(small_config(), "supra", {"decay": "none"}, seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert not any("log_slope" in name for name in first)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    file = Path(__file__).parents[2] / "recipes" / "synthetics.py"
    spec = importlib.util.spec_from_file_location("synthetics", file)
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "synthetics", recipe)
    spec.loader.exec_module(recipe)
    monkeypatch.setattr(recipe, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(recipe, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(recipe, "HELD_OUT", 16)
    monkeypatch.setattr(recipe, "EVERY", 2)
    (tmp_path / "page.md").write_text(
        "above\n<!-- synthetics -->\nold\n<!-- end of synthetics -->\nbelow\n"
    )
    return recipe


@pytest.fixture
def run(recipe, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["synthetics.py", *map(str, words)])
        recipe.main()

    return run


SMALL = ("--batch", 4, "--width", 8, "--steps", 3)


def test_rows_are_trained_and_shown(run, tmp_path, capsys):
    run("--task", "induction", "--mixer", "softmax", "--seeds", "0,1", "--lr", 1e-3, *SMALL)
    run("--task", "mqar", "--mixer", "supra", "--options", '{"decay": "none"}', "--seeds", 7,
        "--length", 16, "--pairs", 2, "--vocabulary", 16, *SMALL)  # fmt: skip
    folder = tmp_path / "results"
    names = sorted(file.name for file in folder.iterdir())
    assert names == [
        "induction-softmax-lr=0.001-batch=4-width=8-3-0.json",
        "induction-softmax-lr=0.001-batch=4-width=8-3-1.json",
        "mqar-supra-decay=none-batch=4-length=16-vocabulary=16-pairs=2-width=8-3-7.json",
    ]
    first, second, third = (json.loads((folder / name).read_text()) for name in names)
    assert list(first["curve"]) == ["2", "3"] and first["accuracy"] == first["curve"]["3"]
    assert first["by_length"].keys() == {"60", "120", "240"} and first["steps_to_95"] is None
    assert (first["loss"], third["loss"], third["chance"]) == ("answers", "answers", 0.5)
    assert third["options"] == {"decay": "none"} and third["language"]["pairs"] == 2
    assert first["training_seconds"] >= 0 and "threads" in first["machine"]
    assert "held_out=" in capsys.readouterr().err
    run("--table")
    table = (tmp_path / "page.md").read_text()
    assert table.startswith("above\n") and table.endswith("below\n") and "old" not in table
    scores = f"{100 * first['accuracy']:.1f} / {100 * second['accuracy']:.1f}"
    assert (
        f"| induction | softmax, lr=0.001, batch=4, width=8 | 3 | 0 / 1 | {scores} | - / - |"
        in table
    )
    assert table.index("| induction |") < table.index("| mqar |")


def test_a_seed_makes_a_row(run, tmp_path):
    words = ("--task", "associative-recall", "--mixer", "softmax", "--pool", 5, *SMALL)
    found = []
    for _ in range(2):
        run(*words, "--seeds", 0)
        (file,) = (tmp_path / "results").iterdir()
        found.append(json.loads(file.read_text()))
        found[-1].pop("training_seconds")
    assert found[0] == found[1] and found[0]["loss"] == "all"


def test_what_diverges_is_a_row(run, tmp_path):
    run("--task", "induction", "--mixer", "softmax", "--seeds", 0, "--lr", 1e30, *SMALL)
    (file,) = (tmp_path / "results").iterdir()
    assert "diverged at step" in json.loads(file.read_text())["failed"]
    run("--table")
    assert "| diverged |" in (tmp_path / "page.md").read_text()


def test_answers_alone_are_learned_or_all_words(recipe):
    language = Induction()
    config = small_config()
    model = testing.untrained_model(config, "softmax")
    rows = some_rows(language, 3)
    for every_token in (False, True):
        ids, labels = labelled(rows, every_token)
        expected = model(input_ids=ids, labels=labels).loss
        assert recipe.mean_loss(model, ids, labels).item() == pytest.approx(
            expected.item(), rel=1e-5
        )


def test_a_pool_is_gone_through(recipe):
    settings = recipe.Settings("induction", "softmax", 1, 0, batch=4, pool=10)
    batches = recipe.training_rows(settings, settings.language)
    seen = [next(batches) for _ in range(20)]
    ids = [tuple(row.ids) for batch in seen for row in batch]
    assert len(set(ids)) == 10 and all(len(batch) == 4 for batch in seen)
    assert len(set(ids[:8])) == 8, "no row comes twice before the next round"
    fresh = recipe.Settings("induction", "softmax", 1, 0, batch=4)
    batches = recipe.training_rows(fresh, fresh.language)
    assert len({tuple(row.ids) for _ in range(20) for row in next(batches)}) == 80


def test_a_small_model_learns(recipe):
    """Every second answer is the same word, which a few steps of training are enough to learn."""
    settings = recipe.Settings(
        "induction", "supra", 30, 0, vocabulary=4, length=6, width=16, lr=0.01
    )
    model = testing.untrained_model(recipe.llama_config(settings, settings.language), "supra")
    curve = recipe.train(model, settings, settings.language)
    assert max(curve.values()) > 0.6


def test_a_model_that_is_not_causal_is_refused(recipe, run, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "future_gradient", lambda *_: float("nan"))
    with pytest.raises(SystemExit) as exit_:
        run("--task", "induction", "--mixer", "softmax", *SMALL)
    assert exit_.value.code == 2 and "softmax is not causal" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--task is missing"),
        (["--task", "induction"], "--mixer is missing"),
        (["--task", "inducton"], "did you mean 'induction'"),
        (["--task", "induction", "--mixer", "supre"], "did you mean 'supra'"),
        (["--task", "induction", "--mixer", "supra", "--options", "x"], "must be a JSON object"),
        (["--task", "induction", "--mixer", "supra", "--options", "[]"], "must be a JSON object"),
        (["--task", "induction", "--mixer", "supra", "--options", '{"deca": 1}'], "'decay'"),
        (
            ["--task", "induction", "--mixer", "supra", "--pairs", 3],
            "--pairs (=3) does not apply to induction",
        ),
        (["--task", "mqar", "--mixer", "supra", "--pairs", 17], "length (=64) must be at least 68"),
        (["--task", "mqar", "--mixer", "supra", "--steps", 0], "--steps (=0) must be at least 1"),
        (["--task", "mqar", "--mixer", "supra", "--pool", 9], "--pool (=9) must be 0, or at least"),
        (
            ["--task", "mqar", "--mixer", "supra", "--heads", 3],
            "must be a multiple of --heads (=3)",
        ),
        (["--task", "mqar", "--mixer", "supra", "--loss", "some"], "unknown loss 'some'"),
        (
            ["--task", "mqar", "--mixer", "supra", "--seeds", ""],
            "--seeds '' must name seeds from 0 on",
        ),
        (
            ["--task", "mqar", "--mixer", "supra", "--seeds", "0,-1"],
            "--seeds '0,-1' must name seeds",
        ),
        (["--task", "mqar", "--mixer", "supra", "--head-size", 0], "--head-size (=0) must be at"),
        (["--task", "mqar", "--mixer", "supra", "--lr", 0], "--lr (=0.0) must be positive"),
    ],
)
def test_mistakes_of_the_recipe(run, tmp_path, capsys, words, message):
    if words and "--mixer" not in words and message != "--mixer is missing":
        words = [*words, "--mixer", "supra"]
    with pytest.raises(SystemExit) as exit_:
        run(*words)
    assert exit_.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("supra: error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not list((tmp_path / "results").glob("*"))
