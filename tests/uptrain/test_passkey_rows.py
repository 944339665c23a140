"""Sources of passkeys: their rows, and runs that train on them."""

import json
import re

import pytest

from supra import cli, testing
from supra.conversion.convert import convert
from supra.data.packing import IGNORE
from supra.errors import UserError
from supra.uptrain import loop, tree
from supra.uptrain.data import held_out_blocks
from supra.uptrain.lanes import Lanes
from supra.uptrain.passkey_rows import PasskeyRows
from tests.uptrain.test_loop import assert_same_weights, interrupt_after, log, merged

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")

LENGTH = 201


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A recurrent student, and a text beside the passkeys with one long document."""
    folder = tmp_path_factory.mktemp("passkeys")
    testing.tiny_checkpoint(folder / "teacher")
    convert(str(folder / "teacher"), folder / "student", mixer="gated_deltanet")
    texts = ["The river rises. " * (n + 9) for n in range(20)] + ["It runs to the sea. " * 400]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return testing.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), "<bos> $A")


def keys(tokenizer, rows):
    """The keys that rows state and the numbers that are learned, which must be the same."""
    found = []
    for row in rows:
        (stated,) = re.findall(r"passkey is (\d{5})\. Rem", tokenizer.decode(row["input_ids"]))
        learned = tokenizer.decode(row["labels"][row["labels"] != IGNORE])
        assert learned == f" {stated}<|endoftext|>"
        found.append(stated)
    return found


def test_a_row_is_a_text_of_its_own(tokenizer):
    rows = PasskeyRows(tokenizer, LENGTH)
    first = [next(rows) for _ in range(8)]
    assert all(row["position_ids"].tolist() == list(range(LENGTH)) for row in first)
    assert len(set(keys(tokenizer, first))) == 8
    rows.cut(LENGTH, 3, "extend.sequence_length")
    longer = next(rows)
    assert len(longer["input_ids"]) == 3 * LENGTH == rows.block_tokens
    again = PasskeyRows(tokenizer, LENGTH)
    again.load_state_dict({"rows": 8})
    again.cut(LENGTH, 3, "extend.sequence_length")
    assert keys(tokenizer, [next(again)]) == keys(tokenizer, [longer])
    other = PasskeyRows(tokenizer, LENGTH, seed=1)
    assert keys(tokenizer, [next(other)]) != keys(tokenizer, first[:1])


def test_processes_share_the_rows(tokenizer):
    def open_lane(lane):
        return PasskeyRows(tokenizer, LENGTH, rank=lane, world=2)

    whole = [x for _ in range(2) for x in Lanes(open_lane, 2).step(4)][:4]
    parts = [x for reader in (0, 1) for x in Lanes(open_lane, 2, reader, 2).step(4)]
    assert keys(tokenizer, parts) == keys(tokenizer, whole)
    assert len(set(keys(tokenizer, parts))) == 4


def test_rows_too_short(tokenizer):
    with pytest.raises(UserError, match=r"tune.sequence_length \(=20\) must be at least"):
        PasskeyRows(tokenizer, LENGTH).cut(20, None, "tune.sequence_length")


# --- whole runs


def config(files, out, **changes):
    sources = [{"path": str(files / "text.jsonl"), "weight": 1}, {"passkeys": 1, "weight": 2}]
    values = {
        "student": str(files / "student"),
        "out": str(out),
        "data": {"sources": sources, "sequence_length": LENGTH},
        "tune": {"tokens": 3 * LENGTH, "optimizer": {"lr": 1e-3}},
        "extend": {"tokens": 3 * 2 * LENGTH, "state_passing": 2},
        "batch": {"size": 1},
        "precision": "fp32",
    }
    return tree.build(merged(values, changes))


def test_interrupted_is_unbroken(files, tmp_path, monkeypatch):
    """Also where the rows become longer, after step 3."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    loop.train(config(files, whole))
    for step in (3, 5):
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            loop.train(config(files, broken))
    loop.train(config(files, broken))
    assert log(broken) == log(whole)
    counts = log(broken, "source_tokens")
    assert counts == log(whole, "source_tokens")
    assert list(counts[6]) == [str(files / "text.jsonl"), "passkeys (1)"]
    assert counts[6]["passkeys (1)"] > counts[6][str(files / "text.jsonl")] > 0
    assert_same_weights(whole, broken)


def test_passkeys_are_not_held_out(files, tmp_path):
    data = {"eval_documents": 4}
    settings = config(files, tmp_path, data=data, eval={"tokens": 2 * LENGTH})
    tokenizer = testing.tiny_tokenizer(tmp_path)
    found = held_out_blocks(settings, tokenizer)
    assert len(found) == 2
    assert all("river" in tokenizer.decode(x["input_ids"]) for x in found)


def test_the_recipe_trains_and_is_evaluated(files, tmp_path, capsys):
    """`--config passkey` on a tiny student, and `supra eval passkey` on what it leaves."""
    sources = f"[{{path: {files / 'text.jsonl'}}}, {{passkeys: 1, weight: 3}}]"
    settings = {
        "student": files / "student",
        "out": tmp_path / "run",
        "data.sources": sources,
        "data.sequence_length": LENGTH,
        "data.eval_documents": 2,
        "eval.tokens": LENGTH,
        "eval.every": 0,
        "tune.sequence_length": LENGTH,
        "tune.share": 0.4,
        "extend.share": 0.6,
        "extend.sequence_length": LENGTH,
        "extend.state_passing": 2,
        "budget.tokens": 10 * LENGTH,
        "precision": "fp32",
    }
    cli.main(["uptrain", "--config", "passkey", *(f"{x}={y}" for x, y in settings.items())])
    assert [*dict.fromkeys(log(tmp_path / "run", "stage").values())] == ["start", "tune", "extend"]
    capsys.readouterr()
    words = ["--model", str(tmp_path / "run" / "final"), "--lengths", "301", "--depths", "2"]
    cli.main(["eval", "passkey", *words, "--samples", "1"])
    assert "301" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"weight": 2}, r"data.sources\[0\].path is missing: set it in the config, or passkeys"),
        ({"passkeys": 0}, r"data.sources\[0\].passkeys \(=0\)"),
        ({"passkeys": 1, "path": "a"}, r"data.sources\[0\].path \(=a\) is for texts that are read"),
        ({"passkeys": 1, "recall": True}, r"data.sources\[0\].recall \(=True\) is for texts"),
    ],
)
def test_mistakes(source, message):
    with pytest.raises(UserError, match=message):
        tree.build(
            {"student": "s", "out": "o", "tune": {"tokens": 9}, "data": {"sources": [source]}}
        )
