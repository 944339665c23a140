"""A run continues only from its own undamaged checkpoints, and says so if anything has changed."""

import errno
import json
import os
import random
import shutil
import signal
from itertools import count
from threading import Event

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file

from supra import cli, testing
from supra.errors import Diverged, UserError
from supra.uptrain import loop, saved_state, tree
from supra.uptrain.config import CheckpointConfig
from supra.uptrain.end_to_end import EndToEnd
from supra.uptrain.held_out import HeldOut
from supra.uptrain.run_data import RunData
from supra.uptrain.run_folder import RunFolder
from tests.checkpoint.test_files import another_process, small_files
from tests.uptrain.test_loop import assert_same_weights, interrupt_after, log, merged
from tests.uptrain.texts import write_texts

pytestmark = pytest.mark.usefixtures("one_thread")


STEPS, LAST, BEFORE = 6, "step-00000004", "step-00000002"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A student, a teacher, text, and two runs: `whole`, and `broken` with checkpoints of the steps
    2 and 4."""
    folder = tmp_path_factory.mktemp("resume")
    testing.tiny_checkpoint(folder / "teacher")
    testing.tiny_checkpoint(folder / "student", seed=1)
    write_texts(folder / "text.jsonl", 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        loop.train(config(folder, folder / "whole"))
        interrupt_after(patch, 4)
        loop.train(config(folder, folder / "broken"))
    return folder


@pytest.fixture(autouse=True)
def shared_cache(files, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", files / "cache")


def config(files, out, **changes):
    values = {
        "student": str(files / "student"),
        "teacher": str(files / "teacher"),
        "out": str(out),
        "data": {"path": str(files / "text.jsonl"), "sequence_length": 16},
        "distill": {"tokens": STEPS * 32, "optimizer": {"lr": 1e-3}},
        "batch": {"size": 2},
        "precision": "fp32",
        "checkpoint": {"every": 2, "keep": 2},
    }
    return tree.build(merged(values, changes))


@pytest.fixture
def run(files, tmp_path):
    """A copy of the broken run."""
    return shutil.copytree(files / "broken", tmp_path / "run")


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(path, share=0.5):
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)


def as_earlier_versions_wrote(run):
    for checkpoint in (run / "checkpoints").iterdir():
        for name in ("manifest.json", "origin.json"):
            (checkpoint / name).unlink()


FILES = (
    "model.safetensors",
    "optimizer.bin",
    "random_states_0.pkl",
    "data-0.json",
    "origin.json",
    "manifest.json",
)
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_checkpoint(files, run, name, damage):
    DAMAGES[damage](run / "checkpoints" / LAST / name)
    message = (
        f"{LAST} is damaged: .*. Delete that folder, and the same command continues from {BEFORE}"
    )
    with pytest.raises(UserError, match=message) as error:
        loop.train(config(files, run))
    # a flipped bit in the manifest changes a name or a checksum
    assert name in str(error.value) or (name, damage) == ("manifest.json", "flipped")


def test_the_way_out_is_one(files, run):
    cut(run / "checkpoints" / LAST / "optimizer.bin")
    shutil.rmtree(run / "checkpoints" / LAST)
    loop.train(config(files, run))
    assert log(run) == log(files / "whole")
    assert_same_weights(run, files / "whole")
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / LAST)
    cut(run / "checkpoints" / "step-00000006" / "optimizer.bin")
    with pytest.raises(UserError, match="and the same command starts from the beginning"):
        loop.train(config(files, run))


SOMEBODY_WAS_HERE = {
    "a file of two processes": (
        lambda at: shutil.copy(at / LAST / "data-0.json", at / LAST / "data-1.json"),
        "data-1.json does not belong to this checkpoint",
    ),
    "a file of another step": (
        lambda at: shutil.copy(at / BEFORE / "model.safetensors", at / LAST),
        "model.safetensors has changed since it was written: its checksum differs",
    ),
    "another name": (
        lambda at: os.rename(at / LAST, at / "step-00000005"),
        "step-00000005 is damaged: it was written as step 4",
    ),
    "no files": (
        lambda at: (shutil.rmtree(at / LAST), (at / LAST).mkdir()),
        "random_states_0.pkl is missing",
    ),
    "a folder for a file": (
        lambda at: ((at / LAST / "optimizer.bin").unlink(), (at / LAST / "optimizer.bin").mkdir()),
        "optimizer.bin is missing",
    ),
    "a list of something else": (
        lambda at: (at / LAST / "manifest.json").write_text("[1]"),
        "manifest.json is damaged",
    ),
    "a list of nothing": (
        lambda at: (at / LAST / "manifest.json").write_text('{"files": {}}'),
        "does not belong to this checkpoint",
    ),
    "a file for a checkpoint": (
        lambda at: (at / "step-00000005").write_text("mine"),
        "step-00000005 is not a checkpoint of a run: move it away",
    ),
    "a step without a number": (
        lambda at: (at / "step-last").mkdir(),
        "step-last is not a checkpoint of a run: move it away",
    ),
    "a copy": (
        lambda at: shutil.copytree(at / LAST, at / f"{LAST} (copy)"),
        r"step-00000004 \(copy\) is not a checkpoint of a run: move it away",
    ),
    "checkpoints are a file": (
        lambda at: (shutil.rmtree(at), at.write_text("mine")),
        "checkpoints is not a folder: move it away",
    ),
    "config missing": (
        lambda at: (at.parent / "config.yaml").unlink(),
        r"another config \(its config.yaml is missing or damaged\).*--accept-changed",
    ),
    "config cut": (lambda at: cut(at.parent / "config.yaml", 0.1), "another config"),
    "config binary": (
        lambda at: (at.parent / "config.yaml").write_bytes(b"\xff\x00\xfe"),
        "its config.yaml is missing or damaged",
    ),
    "config a list": (
        lambda at: (at.parent / "config.yaml").write_text("- 1"),
        "its config.yaml is missing or damaged",
    ),
    "config too deep": (
        lambda at: (at.parent / "config.yaml").write_text("[" * 600),
        "its config.yaml is missing or damaged",
    ),
    "something is final": (lambda at: (at.parent / "final").mkdir(), "a finished run"),
}


@pytest.mark.parametrize("case", SOMEBODY_WAS_HERE)
def test_a_run_folder_in_disorder(files, run, case):
    damage, message = SOMEBODY_WAS_HERE[case]
    damage(run / "checkpoints")
    with pytest.raises(UserError, match=message):
        loop.train(config(files, run))


LOGS = {
    "missing": lambda path: path.unlink(),
    "cut": cut,
    "binary": lambda path: path.write_bytes(b"\xff\x00" * 99),
    "no objects": lambda path: path.write_text('[1]\n"step"\n{"stop": 1}\n{"step": "one"}\n'),
}


@pytest.mark.parametrize("case", LOGS)
def test_a_log_that_lost_lines_is_no_reason_to_stop(files, run, capsys, case):
    LOGS[case](run / "log.jsonl")
    loop.train(config(files, run))
    assert "log.jsonl has lost lines: it has" in capsys.readouterr().err
    assert_same_weights(run, files / "whole")
    assert {5: None, 6: None}.keys() <= log(run).keys()


def test_checkpoints_of_earlier_versions_go_on(files, run, capsys):
    as_earlier_versions_wrote(run)
    loop.train(config(files, run))
    assert "was written by an earlier version" in capsys.readouterr().err
    assert_same_weights(run, files / "whole")


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("name", FILES[:4])
def test_damage_that_is_seen_without_a_list(files, run, name, damage):
    if (name, damage) == ("model.safetensors", "flipped"):
        DAMAGES[damage] = lambda path: flip(path, 0)  # in the header; weights have no checksum
    as_earlier_versions_wrote(run)
    share = {"flipped": 0.0} if name.endswith((".json", ".safetensors")) else {}
    path = run / "checkpoints" / LAST / name
    flip(path, share["flipped"]) if damage == "flipped" and share else DAMAGES[damage](path)
    with pytest.raises(UserError, match=f"{LAST} is damaged"):
        loop.train(config(files, run))


def change(files, tmp_path, what):
    """Copies of student, teacher and text; one of them is then replaced."""
    for name in ("student", "teacher"):
        shutil.copytree(files / name, tmp_path / name)
    text = (files / "text.jsonl").read_text()
    if what == "text":
        text = text.replace("river", "water")
    if what == "shorter documents":
        text = "".join(json.dumps({"text": f"a {n}"}) + "\n" for n in range(20))
    if what == "fewer documents":
        text = "".join(text.splitlines(keepends=True)[:1])
    (tmp_path / "text.jsonl").write_text(text)
    if what in ("student", "teacher"):
        testing.tiny_checkpoint(tmp_path / what, seed=7)
    if what == "tokenizer":
        flip(tmp_path / "student" / "tokenizer_config.json")
        path = tmp_path / "student" / "tokenizer_config.json"
        path.write_text((files / "student" / "tokenizer_config.json").read_text() + "\n")
    return config(tmp_path, tmp_path / "run")


@pytest.mark.parametrize(
    "what",
    ["text", "shorter documents", "fewer documents", "student", "teacher", "tokenizer"],
)
def test_what_a_run_reads_is_the_same_or_accepted(files, run, tmp_path, capsys, what):
    settings = change(files, tmp_path, what)
    name = "text" if "documents" in what else what
    paths = yaml.safe_load((run / "config.yaml").read_text())
    for key in ("student", "teacher"):
        paths[key] = str(tmp_path / key)
    paths["data"]["path"] = str(tmp_path / "text.jsonl")
    (run / "config.yaml").write_text(yaml.safe_dump(paths))
    message = (
        f"^{name} changed since .*{LAST} was written: .*--accept-changed to continue from {LAST}"
    )
    with pytest.raises(UserError, match=message):
        loop.train(settings)
    assert loop.train(settings, accept_changed=True) is True
    said = capsys.readouterr().err
    assert f"continuing from {LAST} with changes: another {name}" in said
    assert ("the text ends before the position" in said) == ("documents" in what)
    assert list(log(run)) == list(range(1, STEPS + 1))


def test_a_place_that_the_text_does_not_have_is_never_gone_to(files, run, tmp_path):
    """Also without fingerprints, the run does not continue."""
    as_earlier_versions_wrote(run)
    position = run / "checkpoints" / LAST / "data-0.json"
    position.write_text(json.dumps({"epoch": 0, "documents": 2, "offset": 10**6}))
    with pytest.raises(UserError, match=f"the text ends before the position that .*{LAST}"):
        loop.train(config(files, run))


def test_another_rate_from_the_command_line(files, run, tmp_path, capsys):
    settings = config(files, run).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["uptrain", "--config", str(tmp_path / "config.yaml"), "distill.optimizer.lr=1e-4"]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "--accept-changed to continue from step-00000004" in capsys.readouterr().err
    cli.main([*arguments, "--accept-changed"])
    assert "with changes: distill.optimizer.lr: 0.001 there, 0.0001 here" in capsys.readouterr().err
    whole, now = log(files / "whole", "lr"), log(run, "lr")
    assert [now[step] / whole[step] for step in (4, 5, 6)] == pytest.approx([1, 0.1, 0.1])


def test_changes_that_a_checkpoint_does_not_go_with(files, run):
    """They are not recorded: the run still continues with the old config."""
    with pytest.raises(UserError, match=r"does not fit the changes \(lora"):
        loop.train(config(files, run, lora={"rank": 2}), accept_changed=True)
    loop.train(config(files, run))
    assert_same_weights(run, files / "whole")


# --- another number of processes


def test_steps_keep_their_size(files, run):
    """With another number of processes, accumulation makes up for it, and does not count as a
    change. Here the number stays."""
    others = config(files, run, batch={"accumulation": 3})
    message = (
        rf"{LAST} has steps of another size \(distill: 1 forward passes per step there, 3 here, "
        r"which is batch.accumulation \(=3\) x processes\): set batch.accumulation=1, or give "
        f"--accept-changed to continue from {LAST} with this size"
    )
    with pytest.raises(UserError, match=message):
        loop.train(others)


def test_weights_that_fsdp_has_written(files, run):
    (run / "checkpoints" / LAST / "pytorch_model_fsdp_0").mkdir()
    message = "was written under FSDP, and this run is without .* .*/fsdp.yaml, on any number"
    with pytest.raises(UserError, match=message):
        loop.train(config(files, run))


def as_if_by_two(run):
    """Let the last checkpoint be one of a run that began on two processes."""
    checkpoint = run / "checkpoints" / LAST
    for name in ("manifest.json", "origin.json"):
        (checkpoint / name).unlink()
    position = json.loads((checkpoint / "data-0.json").read_text())
    for lane in (0, 1):
        state = position | {"documents": position["documents"] // 2, "offset": 0}
        (checkpoint / f"data-{lane}.json").write_text(json.dumps(state))
    (checkpoint / "random_states_1.pkl").write_bytes(
        (checkpoint / "random_states_0.pkl").read_bytes()
    )


def test_one_process_goes_on_in_place_of_two(files, run):
    """Also from a checkpoint of an earlier version, whose accumulation counts."""
    as_if_by_two(run)
    way = r"distill: 2 forward passes per step there, 1 here.* set batch.accumulation=2, or"
    with pytest.raises(UserError, match=way):
        loop.train(config(files, run))
    more = config(files, run, batch={"accumulation": 2})
    with pytest.raises(UserError, match=r"another config \(batch.accumulation: 1 there, 2 here"):
        loop.train(more)
    loop.train(more, accept_changed=True)
    assert list(log(run)) == [1, 2, 3, 4]


# --- weights that are not finite


def poison(monkeypatch, step, what):
    """After `step`, a weight or its moment is NaN."""
    train_step = loop.Run.train_step

    def poisoned(run):
        train_step(run)
        if run.step == step:
            weight = next(run.model.parameters())
            bad = weight if what == "weight" else run.optimizer.state[weight]["exp_avg_sq"]
            bad.data.view(-1)[-1] = torch.nan if what == "weight" else torch.inf

    monkeypatch.setattr(loop.Run, "train_step", poisoned)


@pytest.mark.parametrize("what", ["weight", "moment"])
@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (4, {"checkpoint": {"keep": 1}}),
        (6, {"checkpoint": {"keep": 1}}),
        (3, {"data": {"eval_documents": 3}, "eval": {"every": 3, "tokens": 16}}),
    ],
    ids=["checkpoint", "end", "evaluation"],
)
def test_weights_are_numbers_when_they_are_saved(files, tmp_path, monkeypatch, step, changes, what):
    poison(monkeypatch, step, what)
    message = (
        f"after step {step} (exp_avg_sq of )?model.* overflowed: nothing is saved. Lower "
        r"distill.optimizer.lr \(=0.001\) .* --accept-changed then continues from step-0000000[24]"
    )
    out = tmp_path / "run"
    with pytest.raises(Diverged, match=message):
        loop.train(config(files, out, **changes))
    assert RunFolder(out).last_checkpoint().name == f"step-0000000{(step - 1) // 2 * 2}"
    assert not RunFolder(out).final.exists() and "NaN" not in (out / "log.jsonl").read_text()


def test_a_rate_that_is_far_too_high(files, run, tmp_path):
    """Nothing is exported; a lower rate continues from the checkpoint of finite weights."""
    optimizer = {"optimizer": {"lr": 1e38}, "schedule": {"warmup": 0}}
    fresh = tmp_path / "fresh"
    with pytest.raises(Diverged, match="the same command then starts from the beginning"):
        loop.train(config(files, fresh, distill=optimizer))
    assert not RunFolder(fresh).final.exists() and RunFolder(fresh).last_checkpoint() is None
    loop.train(config(files, fresh))
    assert_same_weights(fresh, files / "whole")
    high = config(files, run, distill=optimizer, checkpoint={"keep": 1, "every": 1})
    with pytest.raises(
        Diverged, match=f"--accept-changed then continues from {LAST} with the new rate"
    ):
        loop.train(high, accept_changed=True)
    loop.train(config(files, run), accept_changed=True)
    assert_same_weights(run, files / "whole")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_with_bad_gradients_changes_nothing(files, tmp_path, monkeypatch, bad):
    settings = config(files, tmp_path / "run")
    add_gradients = EndToEnd.add_gradients

    def poisoned(objective, batches):
        next(objective.model.parameters()).register_hook(lambda gradient: gradient * bad)
        return add_gradients(objective, batches)

    trainer = loop.Run(settings)
    trainer.train_step()
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    moments = [x["exp_avg"].clone() for x in trainer.optimizer.state.values()]
    monkeypatch.setattr(EndToEnd, "add_gradients", poisoned)
    with pytest.raises(Diverged, match=r"step 2: the loss is .* changed no weights"):
        trainer.train_step()
    trainer.close()
    assert trainer.step == 1
    assert all(torch.equal(before[name], x) for name, x in trainer.model.state_dict().items())
    now = [x["exp_avg"] for x in trainer.optimizer.state.values()]
    assert all(torch.equal(*pair) for pair in zip(moments, now, strict=True))


def spoil(monkeypatch, *steps):
    """The gradients of these steps are NaN."""
    train_step, losses = loop.Run.train_step, EndToEnd._losses
    bad = []

    def spoilt_step(run):
        bad[:] = [torch.nan if run.step + 1 in steps else 1.0]
        train_step(run)

    def spoilt_losses(objective, *inputs):
        found = losses(objective, *inputs)
        return found._replace(total=found.total * bad[0])

    monkeypatch.setattr(loop.Run, "train_step", spoilt_step)
    monkeypatch.setattr(EndToEnd, "_losses", spoilt_losses)


def leave_out(monkeypatch, *steps):
    """These steps read their rows and do nothing else."""
    train_step = loop.Run.train_step

    def read_only(run):
        if run.step + 1 not in steps:
            return train_step(run)
        run.stream.step(run.stage.rows)
        run.step += 1

    monkeypatch.setattr(loop.Run, "train_step", read_only)


def test_steps_that_are_not_finite_are_skipped(files, tmp_path, monkeypatch, capsys):
    """Also when the run is interrupted between two of them, and at the first step."""
    reference, broken = tmp_path / "reference", tmp_path / "broken"
    with monkeypatch.context() as patch:
        leave_out(patch, 1, 3, 4)
        loop.train(config(files, reference))
    capsys.readouterr()
    settings = config(files, broken, max_skipped_steps=2, checkpoint={"every": 1})
    with monkeypatch.context() as patch:
        spoil(patch, 1, 3, 4)
        interrupt_after(patch, 3)
        assert loop.train(settings) is False
    with monkeypatch.context() as patch:
        spoil(patch, 1, 3, 4)
        loop.train(settings)
    assert_same_weights(reference, broken)
    assert log(broken, "skipped") == {1: 1, 3: 1, 4: 2} and list(log(broken)) == [2, 5, 6]
    assert log(broken, "tokens") == {step: step * 32 for step in range(1, STEPS + 1)}
    assert "NaN" not in (broken / "log.jsonl").read_text()
    said = capsys.readouterr().err
    assert "gradient norm nan: it is skipped, 2 of at most 2 in a row" in said
    assert "lost lines" not in said


def test_too_many_skipped_steps_end_the_run(files, tmp_path, monkeypatch):
    """Those before an interruption count. More may be allowed without --accept-changed."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, 3, 4, 5)
        interrupt_after(patch, 4)
        loop.train(config(files, out, max_skipped_steps=2))
    with monkeypatch.context() as patch:
        spoil(patch, 3, 4, 5)
        with pytest.raises(Diverged, match=r"step 5: .*, after 2 skipped steps in a row; this"):
            loop.train(config(files, out, max_skipped_steps=2))
        assert RunFolder(out).last_checkpoint().name == "step-00000004"
        loop.train(config(files, out, max_skipped_steps=3))
    assert list(log(out)) == [1, 2, 6]


def test_a_run_that_was_begun_before_a_setting_was_there_goes_on(files, run):
    """Settings that are null by default, such as data.sources, and those that move no weights may
    be missing in its config."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    values.pop("max_skipped_steps")
    for section, key in (("data", "sources"), ("distill", "sequence_length"), ("distill", "batch")):
        values[section].pop(key, None)
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert RunFolder(run).changes(config(files, run)) == []


# --- the best checkpoint


def test_the_best_checkpoint_is_kept(files, tmp_path, monkeypatch, capsys):
    """The second stage learns its text fast and unlearns the letters of the held-out text."""
    out, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    (tmp_path / "letters.txt").write_text("".join(random.Random(0).choices("JKQVXYZ", k=50)))
    changes = {
        "data": {"eval_path": str(tmp_path / "letters.txt")},
        "distill": {"tokens": 3 * 32},
        "tune": {"tokens": 3 * 32, "optimizer": {"lr": 0.3}},
        "eval": {"every": 1},
    }
    ways = {name: {"every": 0, "keep": 1, "best": name} for name in ("keep", "export")}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        loop.train(config(files, out, **changes, checkpoint=ways["keep"]))
    loop.train(config(files, out, **changes, checkpoint=ways["keep"]))
    losses = log(out, "eval_loss")
    del losses[0]  # there is no checkpoint of the start
    best = min(losses, key=losses.get)
    assert best < 6 and losses[6] > losses[best] + 0.1
    name = f"step-{best:08d}"
    assert sorted(os.listdir(checkpoints)) == [name, "step-00000006"]
    said = capsys.readouterr().err
    assert f"best: {checkpoints / name}, with a held-out loss of {losses[best]:.4f}" in said
    weights_at = {
        x: load_file(checkpoints / x / "model.safetensors") for x in os.listdir(checkpoints)
    }
    check_exported(out, weights_at["step-00000006"])
    shutil.rmtree(out / "final")
    loop.train(config(files, out, **changes, checkpoint=ways["export"]))
    check_exported(out, weights_at[name])
    of_the_card = RunFolder(out).log.perplexities(best)["uptrained"]
    assert of_the_card == {"held-out perplexity": log(out, "eval_perplexity")[best]}


def check_exported(out, state):
    """out/final has the weights of a checkpoint."""
    exported = load_file(out / "final" / "model.safetensors")
    assert all(torch.equal(x, state[f"model.{name}"]) for name, x in exported.items())


def test_losses_on_another_text_do_not_count(files, tmp_path):
    """After a change of eval.tokens, the lowest loss of before is not the lowest."""
    folder = RunFolder(tmp_path)
    first, second = (
        HeldOut(None, held_out(files, tmp_path, tokens), 1, None, None).digest
        for tokens in (64, 80)
    )
    for step, loss, text in ((1, 1.0, first), (2, 1.5, second), (3, 1.8, second)):
        checkpoint = folder.checkpoint(step)
        checkpoint.mkdir(parents=True)
        origin = {"step": step, "held_out_loss": loss, "held_out": text}
        (checkpoint / "origin.json").write_text(json.dumps(origin))
    assert folder.best_checkpoint(first) == (folder.checkpoint(1), 1.0)
    assert folder.best_checkpoint(second) == (folder.checkpoint(2), 1.5)
    folder.prune(CheckpointConfig(keep=1, best="keep"), second)
    assert folder.all_checkpoints() == [folder.checkpoint(2), folder.checkpoint(3)]


def held_out(files, out, tokens):
    settings = {"data": {"eval_path": str(files / "text.jsonl")}, "eval": {"tokens": tokens}}
    return RunData(config(files, out, **settings), 0, 1).held_out


def test_the_loss_of_the_best_checkpoint_is_damaged(files, run):
    (run / "checkpoints" / BEFORE / "origin.json").write_text("{")
    settings = config(
        files,
        run,
        checkpoint={"best": "keep"},
        eval={"every": 1},
        data={"eval_path": str(files / "text.jsonl")},
    )
    with pytest.raises(UserError, match=rf"{BEFORE} is damaged: origin.json is not JSON. Delete"):
        loop.train(settings, accept_changed=True)


# --- one writer, full disks, kills


def test_two_runs_in_one_folder(files, run):
    before = (run / "log.jsonl").read_text()
    held = another_process(run, lambda out: RunFolder(out).locked())
    with held, pytest.raises(UserError, match=f"another process is writing to {run}"):
        loop.train(config(files, run))
    assert (run / "log.jsonl").read_text() == before
    loop.train(config(files, run))
    assert_same_weights(run, files / "whole")


def test_a_run_that_fails_lets_go_of_its_folder(files, tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="no such folder"):
            loop.train(config(files, tmp_path / "run", student="./none"))


@pytest.mark.parametrize("most", [10_000, 100_000, 300_000, 500_000])
def test_a_full_disk_leaves_the_last_checkpoint(files, run, most):
    message = "the checkpoint of step 6 cannot be written: .* the same command continues"
    with small_files(most), pytest.raises(UserError, match=message):
        loop.train(config(files, run))
    assert sorted(os.listdir(run / "checkpoints")) == [BEFORE, LAST]
    loop.train(config(files, run))
    assert_same_weights(run, files / "whole")


def test_training_goes_on_while_a_checkpoint_is_completed(files, tmp_path, monkeypatch):
    """The checksums of step 2 are written after step 3."""
    third, write_manifest, train_step = Event(), saved_state.write_manifest, loop.Run.train_step

    def late(folder):
        assert third.wait(timeout=300)
        write_manifest(folder)

    def told(run):
        train_step(run)
        if run.step == 3:
            third.set()

    monkeypatch.setattr(saved_state, "write_manifest", late)
    monkeypatch.setattr(loop.Run, "train_step", told)
    loop.train(config(files, tmp_path / "run"))
    assert_same_weights(tmp_path / "run", files / "whole")
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [LAST, "step-00000006"]


def test_a_checkpoint_that_is_not_completed_is_left_out(files, tmp_path, monkeypatch):
    """The error comes with the next checkpoint; the one before is the last."""
    out, write_manifest, manifests = tmp_path / "run", saved_state.write_manifest, count(1)

    def full(folder):
        if next(manifests) == 2:
            raise OSError(errno.ENOSPC, "no room")
        write_manifest(folder)

    with monkeypatch.context() as patch:
        patch.setattr(saved_state, "write_manifest", full)
        with pytest.raises(UserError, match=r"checkpoint of step 4 cannot be written: .*no room"):
            loop.train(config(files, out))
    assert os.listdir(out / "checkpoints") == [BEFORE]
    loop.train(config(files, out))
    assert_same_weights(out, files / "whole")


def test_what_kills_left_goes_when_a_run_goes_on(files, run, monkeypatch):
    """After a kill during saving, pruning or the export, or between the first two."""
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / LAST, checkpoints / ".step-00000001.partial")
    (checkpoints / ".step-00000006.partial").mkdir()
    (run / ".final.partial").mkdir()
    (run / ".log.jsonl.partial").write_text("{")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        loop.train(config(files, run, checkpoint={"every": 0, "keep": 1}))
    assert os.listdir(checkpoints) == ["step-00000005"]
    loop.train(config(files, run, checkpoint={"keep": 1}))
    assert os.listdir(checkpoints) == ["step-00000006"]
    assert sorted(os.listdir(run)) == ["checkpoints", "config.yaml", "final", "log.jsonl"]
    assert_same_weights(run, files / "whole")


@pytest.mark.parametrize(
    ("number", "where", "code"),
    [
        (signal.SIGTERM, "_open_data", 143),
        (signal.SIGTERM, "_load_models", 143),
        (signal.SIGINT, "_load_models", 130),
        (signal.SIGTERM, "evaluate", 130),
        (signal.SIGUSR1, "_load_models", 130),
    ],
)
def test_signals_before_the_first_step(files, tmp_path, monkeypatch, capsys, number, where, code):
    """While models and text are loading, signals end the run at once; later, and SIGUSR1 always,
    they end it after the step. The same command then gives the same result."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config(files, tmp_path / "run").model_dump(mode="json")))
    act = getattr(loop.Run, where)

    def signalled(*inputs, **options):
        os.kill(os.getpid(), number)
        return act(*inputs, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(loop.Run, where, signalled)
        cli.main(["uptrain", "--config", str(file)])
    assert end.value.code == code and "Traceback" not in capsys.readouterr().err
    cli.main(["uptrain", "--config", str(file)])
    assert_same_weights(tmp_path / "run", files / "whole")
