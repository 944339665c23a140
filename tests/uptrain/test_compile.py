"""`compile: true`: no graph breaks, nothing compiled anew between steps, the same training."""

import datasets
import pytest
import torch
from torch._dynamo.utils import counters

from supra import testing
from supra.conversion.convert import convert
from supra.uptrain import compiled, loop, tree
from tests.uptrain.texts import write_texts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A teacher, a student of it with three layers, and text."""
    folder = tmp_path_factory.mktemp("compile")
    testing.tiny_checkpoint(folder / "teacher", num_hidden_layers=3, tie_word_embeddings=True)
    convert(str(folder / "teacher"), folder / "student", mixer="mamba2")
    write_texts(folder / "text.jsonl", 40)
    return folder


@pytest.fixture(autouse=True)
def fast(monkeypatch, tmp_path):
    """Graphs are traced and differentiated, and run without inductor's code."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    torch.compiler.reset()
    counters.clear()


def config(files, out, stage, **changes):
    values = {
        "student": str(files / "student"),
        "out": str(out),
        "data": {"path": str(files / "text.jsonl"), "sequence_length": 32},
        "batch": {"size": 2},
        "precision": "fp32",
        "compile": True,
        stage: {"tokens": 6 * 64},
    }
    if stage == "distill":
        values["teacher"] = str(files / "teacher")
    return tree.build(values | changes)


def losses(settings, steps=6):
    """The losses of a run's first steps, and how many graphs there were after each."""
    run, found, graphs = loop.Run(settings), [], []
    add = run.objective.add_gradients
    run.objective.add_gradients = lambda batches: found.append(add(batches)) or found[-1]
    try:
        for _ in range(steps):
            run.train_step()
            graphs.append(counters["stats"]["unique_graphs"])
    finally:
        run.close()
    return [x["loss"] for x in found], graphs


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("align", {}), ("distill", {}), ("tune", {"gradient_checkpointing": True})],
)
def test_steps_compile_once_and_train_the_same(files, tmp_path, stage, changes):
    plain, none = losses(config(files, tmp_path / "plain", stage, compile=False, **changes))
    assert none == [0] * 6
    fast, graphs = losses(config(files, tmp_path / "fast", stage, **changes))
    assert fast == pytest.approx(plain, rel=1e-5)
    assert graphs[1] == graphs[-1] and 0 < graphs[-1] <= 6, graphs
    assert not counters["graph_break"]
