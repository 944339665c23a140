"""`compile: true`: no graph breaks, nothing compiled anew between steps, the same training."""

import datasets
import pytest
import torch
from torch._dynamo.utils import counters

from supra import testing
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.errors import UserError
from supra.uptrain import accelerator, compiled, loop, tree
from tests.native_models import native_model
from tests.uptrain.test_loop import assert_same_weights, interrupt_after, log
from tests.uptrain.texts import write_texts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A teacher, a student of it with two layers, and text."""
    folder = tmp_path_factory.mktemp("compile")
    testing.tiny_checkpoint(folder / "teacher", num_hidden_layers=2, tie_word_embeddings=True)
    convert(str(folder / "teacher"), folder / "student", mixer="supra")
    write_texts(folder / "text.jsonl", 40)
    return folder


@pytest.fixture(autouse=True)
def fast(monkeypatch, tmp_path):
    """Graphs are traced, and run without inductor's code."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
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


def losses(settings, steps=4):
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
    assert none == [0] * 4
    fast, graphs = losses(config(files, tmp_path / "fast", stage, **changes))
    assert fast == pytest.approx(plain, rel=1e-5)
    assert graphs[1] == graphs[-1] and 0 < graphs[-1] <= 6, graphs
    assert not counters["graph_break"]


def test_an_interrupted_run_ends_with_the_same_weights(files, tmp_path, monkeypatch):
    """Interrupted in the second of two stages, which are compiled one after the other."""
    stages = {"align": {"tokens": 64}, "distill": {"tokens": 3 * 64}}
    loop.train(config(files, tmp_path / "whole", "distill", **stages))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        loop.train(config(files, tmp_path / "broken", "distill", **stages))
    torch.compiler.reset()  # a new process has no graphs
    loop.train(config(files, tmp_path / "broken", "distill", **stages))
    assert log(tmp_path / "whole") == log(tmp_path / "broken")
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orient": {"tokens": 64}}, "compile .=True. does not go with the stage orient, which"),
        ({"extend": {"tokens": 64}}, "with the stage extend, which hands states on .*: run it sep"),
        ({"lora": {}}, "does not go with lora: .* set compile=false, or lora=null"),
    ],
)
def test_what_is_not_compiled(files, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        config(files, tmp_path, "tune", **changes)


def test_a_machine_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        UserError, match=r"compile \(=True\) needs a C\+\+ compiler, .* CXX, or set"
    ):
        compiled.check_compiler()


def test_several_processes_are_refused(files, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator.Accelerator, "num_processes", 2)
    with pytest.raises(UserError, match=r"runs in one process, and there are 2: .* compile=false"):
        accelerator.open_accelerator(config(files, tmp_path, "tune"), tmp_path)


def test_a_model_that_is_recurrent_itself_is_refused():
    with pytest.raises(UserError, match=r"does not go with model_type 'mamba2': .* compile=false"):
        compiled.Compiled(native_model("mamba2"), asked=True)


def test_a_mixer_that_decides_by_chance_is_refused(files, tmp_path):
    convert(str(files / "teacher"), tmp_path / "window", mixer="lolcats")
    student = find_checkpoint(str(tmp_path / "window")).model(torch.float32)
    with pytest.raises(UserError, match=r"does not go with the mixer window .* set compile=false"):
        compiled.Compiled(student, asked=True)
