"""Mixtures: shares of tokens, rows of one source, exact resume, ranks, and the log."""

import json
import re

import datasets
import pytest
import torch

from supra import cli, testing
from supra.data.recall import recall_text
from supra.data.text import Documents
from supra.errors import UserError
from supra.uptrain import loop, tree
from supra.uptrain.data import BlockStream, held_out_blocks
from supra.uptrain.mixture import Mixture
from supra.uptrain.run_data import RunData
from tests.uptrain.test_loop import assert_same_weights, interrupt_after, log, merged

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")

LENGTH = 16
LETTERS = "abc"  # a source's documents have no letter of another source


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A student, and three texts of different letters and lengths."""
    folder = tmp_path_factory.mktemp("mixture")
    testing.tiny_checkpoint(folder / "student")
    for number, letter in enumerate(LETTERS):
        rows = [{"text": letter * (5 + (7 * n + number) % 40)} for n in range(12)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{letter}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return testing.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def mixture(tokenizer, shares, *, streaming=False, seed=0, rank=0, world=1, segments=None):
    streams = []
    for letter in LETTERS[: len(shares)]:
        dataset = datasets.Dataset.from_dict({"text": [letter * n for n in range(3, 60, 4)]})
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        options = {"rank": rank, "world": world, "segments": segments, "name": letter}
        documents = Documents(dataset, "text", seed, 8)
        streams.append(BlockStream(documents, tokenizer, LENGTH, **options))
    return Mixture(streams, shares, seed=seed, rank=rank)


def source_of(tokenizer, block):
    (letter,) = set(re.sub(r"<\|endoftext\|>", "", tokenizer.decode(block["input_ids"])))
    return letter


@pytest.mark.parametrize("seed", [0, 1, None])
@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.9, 0.1], [0.62, 0.31, 0.07]])
def test_a_row_has_one_source_and_each_source_its_share_of_the_tokens(tokenizer, shares, seed):
    blocks, counts = mixture(tokenizer, shares, seed=seed), dict.fromkeys(LETTERS, 0)
    for number in range(1, 120):
        counts[source_of(tokenizer, next(blocks))] += LENGTH
        assert blocks.tokens == [counts[letter] for letter, _ in zip(LETTERS, shares, strict=False)]
        for letter, share in zip(LETTERS, shares, strict=False):
            assert abs(counts[letter] - share * number * LENGTH) < 2 * LENGTH


def test_shares_are_of_tokens_also_where_rows_differ(tokenizer):
    blocks = mixture(tokenizer, [0.7, 0.3])
    for length, segments in ((LENGTH, None), (LENGTH, 2), (3 * LENGTH, None)):
        blocks.cut(length, segments, "data.sequence_length")
        for _ in range(20):
            next(blocks)
    assert blocks.tokens[0] == pytest.approx(0.7 * sum(blocks.tokens), abs=2 * 3 * LENGTH)
    assert sum(blocks.tokens) == 20 * 6 * LENGTH


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_resume_is_exact_at_every_block(tokenizer, streaming, rank):
    def make():
        return mixture(tokenizer, [0.6, 0.3, 0.1], streaming=streaming, rank=rank, world=3)

    unbroken, states, blocks = make(), [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(unbroken.state_dict())))
        blocks.append(next(unbroken))
    assert states[-1]["sources"][0]["epoch"] >= 1, "the grid must pass the end of an epoch"
    for index, state in list(enumerate(states))[:: 3 if streaming else 1]:
        resumed = make()
        resumed.load_state_dict(state)
        assert resumed.found and resumed.state_dict() == state
        for block in blocks[index : index + 3]:
            found = next(resumed)
            assert all(torch.equal(found[x], block[x]) for x in block)


def test_processes_read_different_sources_in_a_step(tokenizer):
    """Of eight processes that read two sources in turn, not all begin with the same one."""
    ranks = [mixture(tokenizer, [0.5, 0.5], rank=rank, world=8) for rank in range(8)]
    for _ in range(4):
        assert len({source_of(tokenizer, next(blocks)) for blocks in ranks}) == 2


def test_a_source_without_text_is_named(tokenizer):
    empty = Documents(datasets.Dataset.from_dict({"text": [" "]}), "text")
    blocks = Mixture([BlockStream(empty, tokenizer, LENGTH, name="the source b.jsonl")], [1.0])
    with pytest.raises(UserError, match=r"no text in the source b.jsonl: all 1 documents"):
        next(blocks)


# --- whole runs


def sources(files, *weights):
    return [
        {"path": str(files / f"{letter}.jsonl"), "weight": weight}
        for letter, weight in zip(LETTERS, weights, strict=False)
    ]


def config(files, out, **changes):
    values = {
        "student": str(files / "student"),
        "out": str(out),
        "data": {"sources": sources(files, 2, 1, 1), "sequence_length": LENGTH},
        "tune": {"tokens": 8 * 4 * LENGTH, "optimizer": {"lr": 1e-3}},
        "batch": {"size": 2, "accumulation": 2},
        "precision": "fp32",
    }
    return tree.build(merged(values, changes))


@pytest.mark.parametrize("recall", [False, True])
def test_interrupted_is_unbroken(files, tmp_path, monkeypatch, recall):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    texts = sources(files, 2, 1, 1)
    texts[1]["recall"] = recall
    data = {"sources": texts}
    loop.train(config(files, whole, data=data))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        loop.train(config(files, broken, data=data))
    loop.train(config(files, broken, data=data))
    assert log(broken) == log(whole)
    assert log(broken, "source_tokens") == log(whole, "source_tokens")
    assert_same_weights(whole, broken)


def test_the_command_takes_sources_and_counts_their_tokens(files, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"student: {files}/student\nprecision: fp32\nbatch: {{size: 2}}\n"
        f"tune: {{tokens: {10 * 2 * LENGTH}}}\n"
        f"data:\n  sequence_length: {LENGTH}\n  sources:\n"
        f"  - {{path: {files}/a.jsonl, weight: 3}}\n  - path: {files}/b.jsonl\n"
    )
    cli.main(["uptrain", "--config", str(file), f"out={tmp_path}/run"])
    counts = log(tmp_path / "run", "source_tokens")
    names = [f"{files}/a.jsonl", f"{files}/b.jsonl"]
    assert list(counts[10]) == names
    assert all(sum(found.values()) == step * 2 * LENGTH for step, found in counts.items())
    assert counts[10][names[0]] == pytest.approx(0.75 * 10 * 2 * LENGTH, abs=2 * LENGTH)


def test_one_path_has_no_counts(files, tmp_path):
    data = {"sources": [], "path": str(files / "a.jsonl")}
    loop.train(config(files, tmp_path / "run", data=data, tune={"tokens": 64}))
    assert log(tmp_path / "run", "source_tokens") == {}


def test_held_out_documents_come_from_every_source(files, tokenizer, tmp_path):
    data = {"eval_documents": 6, "sources": sources(files, 3, 1)}
    settings = config(files, tmp_path, data=data, eval={"tokens": 8 * LENGTH})
    found = [source_of(tokenizer, x) for x in held_out_blocks(settings, tokenizer)]
    assert found == ["a"] * 6 + ["b"] * 2
    trained = [list(x.epoch(0)) for x in RunData(settings, 0, 1).documents]
    assert [len(x) for x in trained] == [6, 6]


def test_a_source_rewritten_for_recall(files, tokenizer, tmp_path):
    """Beside the plain text from the same file. Held-out documents are not rewritten."""
    path = str(files / "a.jsonl")
    data = {"eval_documents": 6, "sources": [{"path": path}, {"path": path, "recall": True}]}
    settings = config(files, tmp_path, data=data, eval={"tokens": 8 * LENGTH})
    plain, rewritten = (list(x.epoch(0)) for x in RunData(settings, 0, 1).documents)
    assert sorted(rewritten) == sorted(recall_text(x) for x in plain)
    assert all(len(x) > len(y) for x, y in zip(rewritten, plain, strict=True))
    assert [x.label for x in settings.data.texts] == [path, f"{path} (recall)"]
    first, second = held_out_blocks(settings, tokenizer)[::4]
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_chats_are_not_rewritten(files, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    data = {"path": None, "sources": [{"path": str(chats), "recall": True}]}
    with pytest.raises(UserError, match="has a chat, and recall rewrites texts alone"):
        loop.train(config(files, tmp_path / "run", data=data))


def test_a_changed_source_is_seen(files, tmp_path, monkeypatch):
    for letter in LETTERS:
        (tmp_path / f"{letter}.jsonl").write_bytes((files / f"{letter}.jsonl").read_bytes())
    data = {"sources": sources(tmp_path, 1, 1)}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        loop.train(config(files, tmp_path / "run", data=data))
    with pytest.raises(UserError, match=r"data.sources: .*'weight': 1"):
        loop.train(config(files, tmp_path / "run", data={"sources": sources(tmp_path, 1, 2)}))
    (tmp_path / "b.jsonl").write_text('{"text": "' + "b" * 400 + '"}\n')
    with pytest.raises(UserError, match="text changed since"):
        loop.train(config(files, tmp_path / "run", data=data))
    loop.train(config(files, tmp_path / "run", data=data), accept_changed=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "data.path is missing: set it, or data.sources"),
        ({"sources": []}, "data.path is missing"),
        ({"path": "p", "sources": [{"path": "a"}]}, "data.path .=p. and data.sources are both set"),
        ({"sources": [{"weight": 1}]}, r"data.sources\[0\].path is missing: set it in the config"),
        ({"sources": ["a"]}, r"data.sources\[0\] \(='a'\) must be a mapping of settings"),
        ({"sources": "a"}, r"data.sources \(='a'\) must be a list of mappings of settings"),
        ({"sources": [{"path": "a", "weight": 0}]}, r"sources\[0\].weight \(=0\) must be .* > 0"),
        ({"sources": [{"path": "a", "wight": 1}]}, "did you mean data.sources.weight"),
        ({"sources": [{"path": "a"}, {"path": "a"}]}, "data.sources has 'a' twice"),
        ({"sources": [{"path": "a"}], "name": "x"}, "data.name .=x. .* give name in a source"),
        ({"sources": [{"path": "a"}], "split": "x"}, "data.split .=x. .* give split in a source"),
        ({"sources": [{"path": "a"}], "eval_split": "x"}, "give data.eval_path instead"),
    ],
)
def test_mistakes_are_named(data, message):
    with pytest.raises(UserError, match=message):
        tree.build({"student": "s", "out": "o", "tune": {"tokens": 1}, "data": data})
