"""cp_size: rows on two processes, against one process that reads the same rows."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from supra.checkpoint.weights import ModuleReader
from supra.conversion.plan import plan_conversion
from supra.conversion.tensors import load_converted
from supra.errors import UserError
from supra.mixers import resolve_mixer
from supra.testing import tiny_checkpoint, tiny_tokenizer
from supra.uptrain import load_config, train
from supra.uptrain.accelerator import check_launch
from tests.uptrain.test_launch import LAUNCH, launched, logged, run_ranks, settings

MIXERS = ("gated_deltanet", "softmax", "window", "h3")
LAUNCHED = {
    "ddp.yaml": (),
    "long_rows.yaml": (
        "--parallelism_config_dp_shard_size=1",
        "--parallelism_config_cp_size=2",
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A teacher, a student with several mixers, and documents shorter and longer than rows."""
    folder = tmp_path_factory.mktemp("shared")
    base = tiny_checkpoint(folder / "base", num_hidden_layers=len(MIXERS))
    plan = plan_conversion(
        ModuleReader(base), base.config, list(MIXERS), dict(map(resolve_mixer, MIXERS)), None
    )
    load_converted(plan, seed=0, progress=False).save_pretrained(folder / "student")
    tiny_tokenizer(folder / "student")
    letters = random.Random(0)
    with open(folder / "text.jsonl", "w") as file:
        for length in (50, 9, 21, 70, 33, 14, 120, 5, 100):
            print(json.dumps({"text": "".join(letters.choices("JKQVXYZ", k=length))}), file=file)
    return folder


def arguments(files, out):
    """Three steps: two of distill and one of tune."""
    distill = ["distill={share: 0.5}", "tune.share=0.5", f"teacher={files}/base"]
    return [*settings(files, out, 2), *distill, "tune.schedule.warmup=0", "calibrate.tokens=64"]


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    first, *others = arguments(files, out)
    assert train(load_config(first.removeprefix("--config="), others))
    return out


def variables(folder, name):
    """What the launcher sets for two processes of a row."""
    file, own = LAUNCH / name, ("--num_processes=2", *LAUNCHED[name])
    if name == "ddp.yaml":  # which leaves parallelism_config out
        shared = "parallelism_config:\n  parallelism_config_cp_size: 2\n"
        file = folder / "launch.yaml"
        file.write_text((LAUNCH / name).read_text() + shared)
    return launched(file, *own)


@pytest.mark.parametrize(
    "name", ["ddp.yaml", pytest.param("long_rows.yaml", marks=pytest.mark.long)]
)
def test_two_processes_of_a_row_train_as_one(files, one_process, tmp_path, name):
    run = tmp_path / "run"
    assert run_ranks(arguments(files, run), variables(tmp_path, name)) == [0, 0]
    lines, expected = logged(run), logged(one_process)
    assert [line["stage"] for line in lines] == [line["stage"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["tokens"] == other["tokens"]
        for key, error in (("loss", 1e-5), ("grad_norm", 1e-4)):
            assert line[key] == pytest.approx(other[key], rel=error)
        assert line["exchanged_mb"] > 0 and line["exchange_seconds"] > 0
    result, wanted = (load_file(x / "final" / "model.safetensors") for x in (run, one_process))
    for weight, value in result.items():
        assert (value - wanted[weight]).abs().max() < 1e-4, weight


@pytest.mark.long  # two launches
@pytest.mark.parametrize("name", LAUNCHED)
def test_it_resumes_to_the_same_bits(files, tmp_path, name):
    run = tmp_path / "run"
    given = [*arguments(files, run), "checkpoint={every: 1, keep: 3}"]
    assert run_ranks(given, variables(tmp_path, name)) == [0, 0]
    whole = load_file(run / "final" / "model.safetensors")
    shutil.rmtree(run / "final")
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step-0000000{step}")
    assert run_ranks(given, variables(tmp_path, name)) == [0, 0]
    now = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(now[key], value) for key, value in whole.items())


@pytest.mark.parametrize(
    ("own", "processes", "message"),
    [
        ([], 6, r"cp_size \(=4\) processes share each row, so it must divide .* \(=6\)"),
        (["tune=null", "align={}"], 4, r"cp_size \(=4\) must be 1 for the stage align, which"),
        (["tune=null", "orient={}"], 4, r"must be 1 for the stage orient, which compares"),
        (["tune=null", "extend={}"], 4, r"must be 1 for the stage extend, which reads rows in"),
        (["data.sequence_length=3"], 8, r"cp_size \(=4\) is more than data.sequence_length \(=3"),
    ],
)
def test_a_run_that_cannot_share_rows_is_refused(tmp_path, monkeypatch, own, processes, message):
    environment = variables(tmp_path, "ddp.yaml") | {"WORLD_SIZE": str(processes)}
    environment |= {"PARALLELISM_CONFIG_CP_SIZE": "4"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    first, *others = [*settings(tmp_path / "nowhere", tmp_path / "run", 2), *own]
    with pytest.raises(UserError, match=message):
        check_launch(load_config(first.removeprefix("--config="), others))
