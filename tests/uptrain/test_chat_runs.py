"""Training on chats: losses of the assistant's tokens alone, in every way a run is started."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from supra import cli, testing
from supra.checkpoint.opening import find_checkpoint
from supra.data.chat import chat_document
from supra.data.packing import IGNORE, collate, pack
from supra.errors import UserError
from supra.uptrain import loop, tree
from tests.data.templates import TEMPLATES, chat_tokenizer, chats
from tests.uptrain.test_loop import assert_same_weights, interrupt_after, log, merged
from tests.uptrain.texts import write_texts

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")

LENGTH = 48


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A student and a teacher with a chat template, chats, and texts."""
    folder = tmp_path_factory.mktemp("chats")
    for seed, name in enumerate(("student", "teacher")):
        testing.tiny_checkpoint(folder / name, seed=seed)
        chat_tokenizer(folder / name, TEMPLATES["chatml"])
    with open(folder / "chats.jsonl", "w") as file:
        for chat in chats(12):
            print(json.dumps({"messages": chat}), file=file)
    write_texts(folder / "text.jsonl", 20)
    return folder


def settings(files, out, **changes):
    values = {
        "student": str(files / "student"),
        "teacher": str(files / "teacher"),
        "out": str(out),
        "data": {"path": str(files / "chats.jsonl"), "sequence_length": LENGTH},
        "distill": {
            "tokens": 6 * 2 * LENGTH,
            "next_token": 0.5,
            "optimizer": {"lr": 1e-3},
            "schedule": {"warmup": 0},
        },
        "batch": {"size": 2},
        "precision": "fp32",
    }
    return merged(values, changes)


def test_the_losses_are_means_over_the_assistants_tokens(files, tmp_path):
    """Next token and KL of the first step, against the same numbers in float64."""
    file = tmp_path / "config.yaml"
    data = {"shuffle_seed": None, "eval_documents": 3}
    values = settings(files, tmp_path / "run", data=data, eval={"tokens": LENGTH})
    file.write_text(json.dumps(values))  # JSON is YAML
    cli.main(["uptrain", "--config", str(file)])
    tokenizer = find_checkpoint(files / "student").tokenizer()
    documents = (chat_document(tokenizer, chat) for chat in list(chats(12))[3:])
    rows = pack(documents, LENGTH)
    batch = collate([next(rows), next(rows)])
    labels = batch.pop("labels")
    said, predicted = labels[:, 1:][labels[:, 1:] != IGNORE], labels[:, 1:] != IGNORE
    assert 10 < len(said) < 2 * LENGTH - 10, "some of the tokens are the assistant's"
    models = (find_checkpoint(files / x).model(torch.float64) for x in ("student", "teacher"))
    ours, theirs = (x(**batch).logits[:, :-1][predicted].log_softmax(-1).detach() for x in models)
    run = tmp_path / "run"
    expected = cross_entropy(ours, said).item()
    assert log(run, "next_token")[1] == pytest.approx(expected, rel=1e-5)
    kl = kl_div(ours, theirs, log_target=True, reduction="batchmean").item()
    assert log(run, "kl")[1] == pytest.approx(kl, rel=1e-4)
    assert log(run, "eval_loss")[0] > 0, "held-out chats are measured too"


def test_interrupted_is_unbroken_in_a_mixture_with_text(files, tmp_path, monkeypatch):
    paths = (files / "chats.jsonl", files / "text.jsonl")
    data = {"path": None, "sources": [{"path": str(path)} for path in paths]}

    def config(out):
        return tree.build(settings(files, out, data=data))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    loop.train(config(whole))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        loop.train(config(broken))
    loop.train(config(broken))
    assert log(broken) == log(whole)
    assert min(log(whole, "source_tokens")[6].values()) > 0
    assert_same_weights(whole, broken)


def test_a_step_of_questions_alone_changes_nothing(files, tmp_path):
    """Long questions fill rows; such a step has a loss of 0 and not of 0 / 0."""
    chat = [{"role": "user", "content": "river " * 30}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    data = {"path": str(tmp_path / "chats.jsonl")}
    loop.train(tree.build(settings(files, tmp_path / "run", data=data)))
    assert log(tmp_path / "run")[1] == 0 and max(log(tmp_path / "run").values()) > 0


def test_a_tokenizer_without_a_template(files, tmp_path):
    testing.tiny_checkpoint(tmp_path / "student")
    values = settings(files, tmp_path / "run", student=str(tmp_path / "student"))
    with pytest.raises(UserError, match="the tokenizer has no chat template: give text, or set"):
        loop.train(tree.build(values))
