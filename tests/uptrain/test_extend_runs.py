"""The stage extend in a run: its documents, its settings, exact resume, and its errors."""

import json

import datasets
import pytest
import torch
from safetensors.torch import load_file

from supra import cli, testing
from supra.conversion.convert import convert
from supra.data.packing import encode
from supra.data.text import Documents
from supra.errors import UserError
from supra.model.positions import learned_positions
from supra.uptrain import loop, tree
from supra.uptrain.data import BlockStream
from supra.uptrain.initial_state import MAX_POSITIONS, InitialState, check_extends
from supra.uptrain.stages import plan, tokens_read
from tests.uptrain.test_loop import assert_same_weights, interrupt_after, log, merged

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")

SEGMENTS, LENGTH = 3, 12  # of a row, and tokens of a segment


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return testing.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts():
    """Texts of 1 to 180 tokens."""
    return ["", *(f"{chr(65 + n)}" * (n * n % 180) for n in range(30)), " "]


def stream(tokenizer, documents, *, seed=0, **options):
    dataset = datasets.Dataset.from_dict({"text": documents})
    options = {"segments": SEGMENTS} | options
    return BlockStream(Documents(dataset, "text", seed), tokenizer, LENGTH, **options)


def test_rows_are_parts_of_one_document(tokenizer):
    found, size = stream(tokenizer, texts(), seed=None), SEGMENTS * LENGTH
    expected = []
    for text in texts():
        tokens = encode(tokenizer, text)
        expected += [tokens[n : n + size] for n in range(0, len(tokens) - size + 1, size)]
    assert len(expected) > 20
    for tokens in expected * 2:
        row = next(found)
        assert row["input_ids"].tolist() == tokens
        assert row["position_ids"].tolist() == list(range(size))
        assert row["labels"].tolist() == [-100, *tokens[1:]]


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact_at_every_row(tokenizer, world):
    def make():
        return stream(tokenizer, texts(), rank=world - 1, world=world)

    unbroken, states, found = make(), [], []
    for _ in range(50):
        states.append(json.loads(json.dumps(unbroken.state_dict())))
        found.append(next(unbroken))
    assert states[-1]["epoch"] >= 1, "the grid must pass the end of an epoch"
    for state, row in zip(states, found, strict=True):
        resumed = make()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert torch.equal(next(resumed)["input_ids"], row["input_ids"])


def test_from_packed_blocks_to_rows(tokenizer):
    """Cutting in the middle of a document gives the same blocks as loading that position."""
    for count in range(1, 30):
        packed = stream(tokenizer, texts(), segments=None)
        for _ in range(count):
            next(packed)
        state = packed.state_dict()
        loaded = stream(tokenizer, texts())
        loaded.load_state_dict(state)
        packed.cut(LENGTH, SEGMENTS, "data.sequence_length")
        row = next(packed)
        assert torch.equal(row["input_ids"], next(loaded)["input_ids"])
        documents = [encode(tokenizer, text) for text in texts()]
        size, tokens = SEGMENTS * LENGTH, row["input_ids"].tolist()
        assert any(
            tokens == document[n : n + size]
            for document in documents
            for n in range(0, len(document), size)
        )


def test_short_documents_are_left_out(tokenizer):
    least = 50
    long = [text for text in texts() if len(encode(tokenizer, text)) >= least]
    assert 10 < len(long) < 20
    for segments in (None, 1):
        left = stream(tokenizer, texts(), seed=None, segments=segments, min_document_tokens=least)
        right = stream(tokenizer, long, seed=None, segments=segments)
        for _ in range(60):
            assert torch.equal(next(left)["input_ids"], next(right)["input_ids"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"segments": 20},
            r"extend.state_passing \(=20\) x data.sequence_length \(=12\) is 240 tokens of one "
            r"document, and the longest of 32 documents has 170: lower one of them or give longer",
        ),
        (
            {"segments": 20, "rank": 1, "world": 2},
            r"the longest of 16 documents of process 2 of 2 has \d+",
        ),
        (
            {"segments": None, "min_document_tokens": 400},
            r"data.min_document_tokens \(=400\) leaves no document: the longest of 32 documents "
            r"has 170 tokens; lower it",
        ),
    ],
)
def test_no_document_is_long_enough(tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        next(stream(tokenizer, texts(), **options))


def test_no_text(tokenizer):
    with pytest.raises(UserError, match="all 2 documents are blank"):
        next(stream(tokenizer, ["", " "], min_document_tokens=3))


MINIMAL = {"student": "s", "out": "o", "data": {"path": "p", "sequence_length": 10}}


def test_tokens_are_counted_by_stage():
    stages = {"tune": {"tokens": 100}, "extend": {"tokens": 500, "state_passing": 3}}
    stages = plan(tree.build(MINIMAL | {"batch": {"size": 3}} | stages), processes=1)
    assert [(x.start, x.end, x.tokens_per_step) for x in stages] == [(0, 4, 30), (4, 10, 90)]
    assert [tokens_read(stages, step) for step in (0, 3, 4, 5, 10)] == [0, 90, 120, 210, 660]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"extend": {"state_passing": 0}},
            r"extend.state_passing \(=0\) must be a whole number from 1 to",
        ),
        ({"extend": {"initial_state": "none"}}, "unknown extend.initial_state 'none'"),
        ({"gradient_checkpointing": True}, "set gradient_checkpointing=false"),
        ({"teacher": "t"}, "not used without the stage distill"),
        (
            {"data": MINIMAL["data"] | {"min_document_tokens": -1}},
            r"data.min_document_tokens \(=-1\) must be a whole number from 0 to",
        ),
    ],
)
def test_mistakes_in_settings(changes, message):
    changes = changes | {"extend": {"tokens": 1} | changes.get("extend", {})}
    with pytest.raises(UserError, match=message):
        tree.build(MINIMAL | changes)


@pytest.mark.parametrize(
    ("mixer", "family", "extend", "message"),
    [
        ("window", "llama", {"initial_state": "noise"}, r"noise\) cannot .* layer 0 \(window\)"),
        ("hedgehog", "llama", {"initial_state": "noise"}, "cannot replace normalizer"),
        (
            "softmax",
            "llama",
            {"initial_state": "carried"},
            "keep softmax attention: set it to zero",
        ),
        (
            "supra",
            "gpt2",
            {"state_passing": 52},
            "is 520 tokens, but the student has only 512 positions",
        ),
    ],
)
def test_students_that_cannot(mixer, family, extend, message):
    model = testing.untrained_model(testing.tiny_config(family), mixer)
    extend = {"tokens": 1, "state_passing": 60} | extend
    with pytest.raises(UserError, match=message):
        check_extends(model, tree.build(MINIMAL | {"extend": extend}))


def test_positions():
    """A table of positions limits rows; rotary positions only limit them where angles lose
    precision."""
    families = {"llama": None, "gpt_neox": None, "gpt2": 512, "gpt_bigcode": 512, "biogpt": 512}
    for family, most in families.items():
        model = testing.untrained_model(testing.tiny_config(family), "supra")
        assert learned_positions(model) == most, family
        assert InitialState("zero", model, 0).positions == most or MAX_POSITIONS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Converted students, a teacher that is not converted, and text with some long documents."""
    folder = tmp_path_factory.mktemp("extend")
    testing.tiny_checkpoint(folder / "teacher")
    convert(str(folder / "teacher"), folder / "student", mixer="supra")
    convert(str(folder / "teacher"), folder / "hybrid", mixer="supra", keep_attention=[1])
    with open(folder / "text.jsonl", "w") as file:
        for number in range(40):
            text = f"The river rises {number} times. " * (2 + number % 2 * 9)
            print(json.dumps({"text": text}), file=file)
    return folder


ROW = 16  # tokens of a segment
STAGE = {"tokens": 6 * 2 * 2 * 4 * ROW, "state_passing": 4, "optimizer": {"lr": 3e-3}}


def config(files, out, **changes):
    values = {
        "student": str(files / "student"),
        "out": str(out),
        "data": {"path": str(files / "text.jsonl"), "sequence_length": ROW},
        "batch": {"size": 2, "accumulation": 2},
        "precision": "fp32",
        "extend": STAGE,
    }
    return tree.build(merged(values, changes))


TUNED = {"tune": {"tokens": 2 * 2 * 2 * ROW, "optimizer": {"lr": 3e-3}}}


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (4, {"extend": {"initial_state": "noise"}, "precision": "bf16"}),
        (3, {"extend": {"initial_state": "carried"}, "student": "hybrid", "precision": "bf16"}),
        (2, TUNED | {"extend": {"initial_state": "noise"}, "student": "hybrid"}),
        (5, TUNED | {"data": {"streaming": True}}),
        (4, {"extend": {"initial_state": "noise"}, "lora": {"rank": 2, "dropout": 0.5}}),
    ],
    ids=["noise", "carried_hybrid", "boundary", "streaming", "lora"],
)
def test_interrupted_is_unbroken(files, tmp_path, monkeypatch, step, changes):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"student": "student"} | changes
    changes["student"] = str(files / changes["student"])
    loop.train(config(files, whole, **changes))
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        loop.train(config(files, broken, **changes))
    assert list(log(broken)) == list(range(1, step + 1))
    loop.train(config(files, broken, **changes))
    assert log(broken) == log(whole)
    assert_same_weights(whole, broken)


def test_initial_states_differ(files, tmp_path):
    losses = {}
    for kind in ("zero", "noise", "carried"):
        extend = {"initial_state": kind, "tokens": 2 * 2 * 2 * 4 * ROW}
        loop.train(config(files, tmp_path / kind, extend=extend))
        losses[kind] = list(log(tmp_path / kind).values())
    assert losses["zero"][0] == losses["carried"][0] != losses["noise"][0]
    assert losses["zero"][1] != losses["carried"][1]


def test_the_whole_way(files, tmp_path, capsys):
    """From the command line, after another stage: held-out perplexity before and after, and
    tokens."""
    out, step = tmp_path / "run", 2 * 2 * ROW
    file = tmp_path / "config.yaml"
    file.write_text(
        f"data: {{path: {files}/text.jsonl, sequence_length: {ROW}, eval_documents: 8}}\n"
        "batch: {size: 2, accumulation: 2}\n"
        "precision: fp32\n"
        f"tune: {{tokens: {2 * step}}}\n"
        f"extend: {{tokens: {14 * 4 * step}, state_passing: 4, optimizer: {{lr: 5.0e-3}}}}\n"
        "eval: {every: 8, tokens: 256}\n"
    )
    cli.main(["uptrain", "--config", str(file), f"student={files}/student", f"out={out}"])
    assert [*dict.fromkeys(log(out, "stage").values())] == ["start", "tune", "extend"]
    tokens = log(out, "tokens")
    assert [tokens[n] for n in (1, 2, 3, 16)] == [step, 2 * step, 6 * step, 58 * step]
    losses, evaluated = log(out), log(out, "eval_perplexity")
    assert losses[16] < 0.7 * losses[3]
    assert list(evaluated) == [0, 2, 8, 16] and evaluated[16] < evaluated[2]
    assert "extend: held-out perplexity" in capsys.readouterr().err
    before = load_file(files / "student" / "model.safetensors")
    assert before.keys() == load_file(out / "final" / "model.safetensors").keys()


def test_a_student_that_is_not_converted(files, tmp_path):
    with pytest.raises(UserError, match="run `supra convert` on it first"):
        loop.train(config(files, tmp_path / "run", student=str(files / "teacher")))


def test_documents_that_are_too_short(files, tmp_path):
    """The error comes before the first stage."""
    run, extend = tmp_path / "run", {"state_passing": 40}
    with pytest.raises(UserError, match=r"extend.state_passing \(=40\) x data.sequence_length"):
        loop.train(config(files, run, tune=TUNED["tune"], extend=extend))
    assert not (run / "log.jsonl").exists()
