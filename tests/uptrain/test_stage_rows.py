"""Stages with rows of their own length and number: plan, training, exact resume, and mistakes."""

import pytest

from supra import cli, testing
from supra.conversion.convert import convert
from supra.errors import UserError
from supra.uptrain import loop, tree
from supra.uptrain.limits import PASS
from supra.uptrain.stages import plan, tokens_read
from tests.uptrain.test_loop import assert_same_weights, interrupt_after, log, merged
from tests.uptrain.texts import write_texts

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")

STAGES = {
    "align": {"tokens": 128, "sequence_length": 16, "batch": {"size": 4}},
    "tune": {"tokens": 192, "batch": {"accumulation": 2}},
    "extend": {"tokens": 192, "sequence_length": 12, "state_passing": 4, "batch": {"size": 1}},
}
SHAPES = {"align": (1, 4, 16), "tune": (2, 2, 24), "extend": (1, 1, 48)}  # passes, rows, tokens


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    testing.tiny_checkpoint(folder / "teacher")
    convert(str(folder / "teacher"), folder / "student", mixer="supra")
    write_texts(folder / "text.jsonl", 40)
    return folder


def config(files, out, **changes):
    values = {
        "student": str(files / "student"),
        "out": str(out),
        "data": {"path": str(files / "text.jsonl"), "sequence_length": 24},
        "batch": {"size": 2},
        "precision": "fp32",
    }
    return tree.build(merged(values, merged(STAGES, changes)))


def test_budgets_are_tokens_whatever_the_rows(files):
    stages = plan(config(files, "o"), processes=2)
    sizes = [x * y * z * 2 for x, y, z in SHAPES.values()]
    assert [x.tokens_per_step for x in stages] == sizes == [128, 192, 96]
    assert [(x.start, x.end) for x in stages] == [(0, 1), (1, 2), (2, 4)]
    assert [tokens_read(stages, x.end) for x in stages] == [128, 320, 512]


def test_a_stage_reads_its_own_rows(files, tmp_path, monkeypatch):
    """The command takes them from the file and from the command line."""
    seen = {}
    train_step = loop.Run.train_step

    def watched(run):
        add_gradients = run.objective.add_gradients

        def add(batches):
            seen[run.stage.name] = (len(batches), *batches[0]["input_ids"].shape)
            return add_gradients(batches)

        with monkeypatch.context() as patch:
            patch.setattr(run.objective, "add_gradients", add)
            train_step(run)

    monkeypatch.setattr(loop.Run, "train_step", watched)
    file = tmp_path / "config.yaml"
    file.write_text(
        f"student: {files}/student\nprecision: fp32\nbatch: {{size: 2}}\n"
        f"data: {{path: {files}/text.jsonl, sequence_length: 24}}\n"
        "align: {tokens: 128, sequence_length: 16, batch: {size: 4}}\n"
        "tune: {tokens: 192}\n"
        "extend: {tokens: 192, sequence_length: 12, state_passing: 4}\n"
    )
    overrides = ["tune.batch.accumulation=2", "extend.batch.size=1", f"out={tmp_path}/run"]
    cli.main(["uptrain", "--config", str(file), *overrides])
    assert seen == SHAPES
    assert list(log(tmp_path / "run", "tokens").values()) == [64, 128, 224, 320, 368, 416, 464, 512]


def test_interrupted_is_unbroken(files, tmp_path, monkeypatch):
    """Within each stage, and at the ends of stages."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    loop.train(config(files, whole))
    for step in (1, 2, 3, 6):
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            assert loop.train(config(files, broken)) is False
    loop.train(config(files, broken))
    assert log(broken) == log(whole) and log(broken, "tokens") == log(whole, "tokens")
    assert_same_weights(whole, broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tune": {"batch": {"size": PASS}}},
            r"tune.batch.size \(=4194304\) x data.sequence_length \(=24\) is \d+ tokens in one "
            "forward pass, more than 4194304: lower tune.batch.size",
        ),
        (
            {"tune": {"sequence_length": PASS}},
            r"^batch.size \(=2\) x tune.sequence_length \(=4194304\) is \d+ tokens in one",
        ),
        (
            {"tune": {"batch": {"accumulation": 2**22}}},
            r"tune.batch.accumulation \(=4194304\) x batch.size \(=2\) x data.sequence_length",
        ),
        ({"tune": {"sequence_length": 1}}, r"tune.sequence_length \(=1\) must be a whole number"),
        ({"tune": {"batch": {"size": 0}}}, r"tune.batch.size \(=0\) must be a whole number"),
        ({"tune": {"batch": {"sise": 1}}}, "did you mean (tune|align).batch.size"),
        ({"tune": {"batch": 4}}, r"tune.batch \(=4\) must be a mapping of settings"),
    ],
)
def test_mistakes_are_named(files, changes, message):
    with pytest.raises(UserError, match=message):
        config(files, "o", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tune": {"sequence_length": 9999}},
            r"tune.sequence_length \(=9999\) is longer than the data",
        ),
        (
            {"extend": {"sequence_length": 900}},
            r"extend.state_passing \(=4\) x extend.sequence_length \(=900\) is 3600 tokens of one",
        ),
    ],
)
def test_a_later_stage_fails_before_the_first_step(files, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(loop.Run, "train_step", lambda run: pytest.fail("a step"))
    with pytest.raises(UserError, match=message):
        loop.train(config(files, tmp_path / "run", **changes))


def test_learned_positions(files, tmp_path):
    testing.tiny_checkpoint(tmp_path / "gpt2", "gpt2")
    changes = {"student": str(tmp_path / "gpt2"), "align": None, "extend": None}
    message = r"tune.sequence_length \(=600\): the model has learned 512 positions"
    with pytest.raises(UserError, match=message):
        tune = {"sequence_length": 600, "batch": {"size": 1}}
        loop.train(config(files, tmp_path / "run", **changes, tune=tune))
    # no row of 2048 tokens is read
    data = {"sequence_length": 2048}
    tune = {"sequence_length": 32, "tokens": 64}
    loop.train(config(files, tmp_path / "run", **changes, data=data, tune=tune))
