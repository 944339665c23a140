"""recipes/launch/: every file on two ranks, against one process that reads the same rows."""

import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from safetensors.torch import load_file

from supra.checkpoint.weights import ModuleReader
from supra.conversion.plan import plan_conversion
from supra.conversion.tensors import load_converted
from supra.errors import UserError
from supra.mixers import MIXERS, resolve_mixer
from supra.testing import tiny_checkpoint, tiny_tokenizer
from supra.uptrain import load_config, train
from supra.uptrain.accelerator import check_kind, fsdp_plugin
from supra.uptrain.end_to_end import EndToEnd
from tests import cpu_rank

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"
LENGTH = 32
STEPS = 3
PER_STEP = 4  # rows
# the ranks that try a launch file, and what fits it to this machine
RANKS = {"one_gpu.yaml": 1, "ddp.yaml": 2, "fsdp.yaml": 2, "hsdp.yaml": 4}
HERE = {
    "hsdp.yaml": (
        "--num_machines=1",
        "--parallelism_config_dp_replicate_size=2",
        "--parallelism_config_dp_shard_size=2",
    )
}

# a process that has imported all that a rank needs; ranks are forks of it
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["supra.uptrain.loop", "supra.model.modeling", "tests.cpu_rank"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A student with one layer of every mixer, and documents of one row each."""
    folder = tmp_path_factory.mktemp("launch")
    resolved = dict(resolve_mixer(name) for name in MIXERS)
    base = tiny_checkpoint(folder / "base", num_hidden_layers=len(resolved))
    plan = plan_conversion(ModuleReader(base), base.config, list(resolved), resolved, None)
    load_converted(plan, seed=0, progress=False).save_pretrained(folder / "student")
    tokenizer = tiny_tokenizer(folder / "student")
    letters = random.Random(0)
    with open(folder / "text.jsonl", "w") as file:
        for _ in range(STEPS * PER_STEP):
            text = "".join(letters.choices("JKQVXYZ", k=LENGTH - 1))
            assert len(tokenizer(text)["input_ids"]) == LENGTH - 1
            print(json.dumps({"text": text}), file=file)
    return folder


def settings(files, out, rows, accumulation=2):
    return [
        f"--config={ROOT}/recipes/configs/smoke.yaml",
        f"student={files}/student",
        f"data={{path: {files}/text.jsonl, sequence_length: {LENGTH}, eval_documents: 0}}",
        f"out={out}",
        "eval.every=0",
        f"budget.tokens={STEPS * PER_STEP * LENGTH}",
        "precision=fp32",
        f"batch={{size: {rows}, accumulation: {accumulation}}}",
    ]


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    first, *others = share(files, out, 1)
    assert train(load_config(first.removeprefix("--config="), others))
    return out


def launched(file, *extra):
    """The variables that `accelerate launch --config_file FILE` sets."""
    given = ["--config_file", str(file), *extra, "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    if arguments.use_fsdp or arguments.multi_gpu:
        environment = prepare_multi_gpu_env(arguments)
    else:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    return {name: x for name, x in environment.items() if os.environ.get(name) != x}


def run_ranks(arguments, environment, ranks=2, target=cpu_rank.run):
    """Run on this many CPU ranks; returns their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = environment | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    processes = [
        context.Process(
            target=target,
            args=(arguments, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
        )
        for rank in range(ranks)
    ]
    for rank in processes:
        rank.start()
    for rank in processes:
        rank.join(timeout=300)
    for rank in processes:
        rank.kill()
    return [rank.exitcode for rank in processes]


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").open()]


def share(files, out, ranks):
    """The settings of a step with PER_STEP rows on all ranks together."""
    accumulation = min(2, PER_STEP // ranks)
    return settings(files, out, PER_STEP // ranks // accumulation, accumulation)


def check_same(out, reference, steps=STEPS):
    lines, expected = logged(out), logged(reference)
    assert sum("tokens" in line for line in lines) == steps
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for key in line:
            if key.endswith("loss") or key == "grad_norm":  # not in a skipped step
                error = 1e-4 if key == "grad_norm" else 1e-5
                assert line[key] == pytest.approx(other[key], rel=error), key
    result, wanted = (load_file(x / "final" / "model.safetensors") for x in (out, reference))
    assert result.keys() == wanted.keys()
    for name, value in result.items():
        assert (value - wanted[name]).abs().max() < 1e-4, name


def test_every_launch_file_is_tried():
    elsewhere = {"long_rows.yaml"}  # tests/uptrain/test_shared_rows.py
    assert {path.name for path in LAUNCH.iterdir()} == RANKS.keys() | elsewhere


LONG = {"hsdp.yaml": pytest.mark.long}  # four ranks take half a minute on two cores


@pytest.mark.parametrize(
    ("name", "ranks"), [pytest.param(*x, marks=LONG.get(x[0], ())) for x in RANKS.items()]
)
def test_a_launch_file_trains_as_one_process_does(files, one_process, tmp_path, name, ranks):
    environment = launched(LAUNCH / name, f"--num_processes={ranks}", *HERE.get(name, ()))
    assert run_ranks(share(files, tmp_path / "run", ranks), environment, ranks) == [0] * ranks
    check_same(tmp_path / "run", one_process)


def layerwise(files, out, ranks):
    """The settings of a step of each kind: matrices, attention's outputs, and end to end.

    Passes have one row, because the error of a pass is relative to the target in its rows."""
    one = f"tokens: {PER_STEP * LENGTH}"
    stages = f"orient={{{one}}}", f"align={{{one}, target: output}}", f"distill={{{one}}}"
    learnt = "tune=null", f"teacher={files}/base", "calibrate.tokens=64"
    measured = f"data.eval_path={files}/text.jsonl", "eval.tokens=64"
    return [*settings(files, out, 1, PER_STEP // ranks), "budget={}", *stages, *learnt, *measured]


@pytest.mark.parametrize("name", [pytest.param("hsdp.yaml", marks=pytest.mark.long), "fsdp.yaml"])
def test_layers_train_in_parts_as_in_one_process(files, tmp_path, name):
    """Every attention module is a unit of its own, and the next stage runs the whole model. The
    first process calibrates the student, and the teacher is split, too."""
    ranks = RANKS[name]
    environment = launched(LAUNCH / name, f"--num_processes={ranks}", *HERE.get(name, ()))
    assert run_ranks(layerwise(files, tmp_path / "run", ranks), environment, ranks) == [0] * ranks
    first, *others = layerwise(files, tmp_path / "one", 1)
    assert train(load_config(first.removeprefix("--config="), others))
    check_same(tmp_path / "run", tmp_path / "one")
    steps = [line["stage"] for line in logged(tmp_path / "run") if "tokens" in line]
    assert steps == ["orient", "align", "distill"]


@pytest.mark.long  # two launches
@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp.yaml"])
def test_one_process_goes_on_in_place_of_two(files, one_process, tmp_path, name):
    """In the same format. The steps keep their rows, and the losses those of one process."""
    run = tmp_path / "run"
    arguments = [*share(files, run, 2), "checkpoint={every: 1, keep: 3}"]
    assert run_ranks(arguments, launched(LAUNCH / name, "--num_processes=2")) == [0, 0]
    shutil.rmtree(run / "final")
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step-0000000{step}")
    alone = launched(LAUNCH / name, "--num_processes=1")
    assert run_ranks(arguments, alone, ranks=1) == [2]  # its steps would be half as large
    more = [
        *share(files, run, 1),
        "checkpoint={every: 1, keep: 3}",
        "batch={size: 1, accumulation: 4}",
    ]
    assert run_ranks(more, alone, ranks=1) == [0]
    check_same(run, one_process)


@pytest.mark.long  # two launches
def test_layers_in_parts_resume(files, tmp_path):
    """From the middle of align, to the same bits."""
    environment, run = launched(LAUNCH / "fsdp.yaml", "--num_processes=2"), tmp_path / "run"
    twice = f"align={{tokens: {2 * PER_STEP * LENGTH}}}", "orient=null"
    arguments = [*layerwise(files, run, 2), *twice, "checkpoint={every: 1, keep: 3}"]
    assert run_ranks(arguments, environment) == [0, 0]
    whole = load_file(run / "final" / "model.safetensors")
    shutil.rmtree(run / "final")
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step-0000000{step}")
    assert run_ranks(arguments, environment) == [0, 0]
    now = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(now[key], value) for key, value in whole.items())


def spoilt(losses):
    """EndToEnd._losses, with a gradient of NaN in its first call."""
    calls = count(1)

    def first_is_nan(objective, *inputs):
        found = losses(objective, *inputs)
        return found._replace(total=found.total * torch.nan) if next(calls) == 1 else found

    return first_is_nan


def spoilt_rank(arguments, environment):
    if environment["RANK"] == "1":
        EndToEnd._losses = spoilt(EndToEnd._losses)
    cpu_rank.run(arguments, environment)


@pytest.mark.parametrize("name", [pytest.param("ddp.yaml", marks=pytest.mark.long), "fsdp.yaml"])
def test_ranks_skip_a_step_together(files, tmp_path, monkeypatch, name):
    """One rank's gradient is not finite in the first step. FSDP's saving then does not count it."""
    own = ["max_skipped_steps=1", "checkpoint.every=1"]
    environment = launched(LAUNCH / name, "--num_processes=2")
    arguments = [*share(files, tmp_path / "run", 2), *own]
    assert run_ranks(arguments, environment, target=spoilt_rank) == [0, 0]
    assert [line.get("skipped") for line in logged(tmp_path / "run")] == [1, None, None]
    monkeypatch.setattr(EndToEnd, "_losses", spoilt(EndToEnd._losses))
    first, *others = [*share(files, tmp_path / "one", 1), *own]
    assert train(load_config(first.removeprefix("--config="), others))
    check_same(tmp_path / "run", tmp_path / "one")


def test_ranks_share_the_documents_of_every_source(files, tmp_path):
    shutil.copy(files / "text.jsonl", tmp_path / "more.jsonl")
    paths = [str(files / "text.jsonl"), str(tmp_path / "more.jsonl")]
    listed = f"[{{path: {paths[0]}, weight: 3}}, {{path: {paths[1]}}}]"
    environment = launched(LAUNCH / "ddp.yaml", "--num_processes=2")
    arguments = settings(files, tmp_path / "run", 1)
    arguments += ["data.path=null", f"data.sources={listed}"]
    assert run_ranks(arguments, environment) == [0, 0]
    counts = [line["source_tokens"] for line in logged(tmp_path / "run")]
    assert [sum(x.values()) for x in counts] == [PER_STEP * LENGTH * n for n in (1, 2, 3)]
    assert list(counts[-1]) == paths and counts[-1][paths[0]] > counts[-1][paths[1]] > 0


@pytest.mark.long  # five launches
@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp.yaml"])
def test_ranks_agree_on_what_is_saved_and_gone_on_from(files, tmp_path, name):
    """Weights that overflow in any shard are not saved, and a checkpoint resumes only with all its
    files. If one rank ended alone, the other would wait for it."""
    environment = launched(LAUNCH / name, "--num_processes=2")
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    arguments = [*settings(files, run, PER_STEP // 4), "checkpoint={every: 1, keep: 2}"]
    far = ["tune.optimizer.lr=1e38", "tune.schedule.warmup=0"]
    assert run_ranks([*arguments, *far], environment) == [2, 2]
    assert list(run.glob("checkpoints/*")) == list(run.glob("final")) == []
    assert run_ranks(arguments, environment) == [0, 0]
    whole = load_file(run / "final" / "model.safetensors")
    shutil.rmtree(run / "final")
    shutil.rmtree(checkpoints / "step-00000003")
    assert run_ranks([*arguments, *far, "--accept-changed"], environment) == [2, 2]
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    file = max(checkpoints.rglob("*"), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert run_ranks([*arguments, "--accept-changed"], environment) == [2, 2]
    file.write_bytes(content)
    assert run_ranks([*arguments, "--accept-changed"], environment) == [0, 0]
    now = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(now[key], value) for key, value in whole.items())


@pytest.mark.long  # four launches
@pytest.mark.parametrize(
    "own",
    [
        ["--fsdp_activation_checkpointing=true", "--fsdp_state_dict_type=FULL_STATE_DICT"],
        ["--fsdp_reshard_after_forward=false", "--fsdp_auto_wrap_policy=NO_WRAP"],
        ["--fsdp_offload_params=true"],
    ],
)
def test_settings_of_ones_own_for_fsdp(files, one_process, tmp_path, own):
    run = tmp_path / "run"
    environment = launched(LAUNCH / "fsdp.yaml", "--num_processes=2", *own)
    arguments = [*share(files, run, 2), "checkpoint.every=1"]
    assert run_ranks(arguments, environment) == [0, 0]
    check_same(run, one_process)
    if "FULL_STATE_DICT" in own[-1]:
        shutil.rmtree(run / "final")
        shutil.rmtree(run / "checkpoints" / "step-00000003")
        assert run_ranks(arguments, environment) == [0, 0]
        check_same(run, one_process)


@pytest.mark.long  # ten seconds each, most of them imports
@pytest.mark.parametrize(("name", "ranks"), RANKS.items())
def test_accelerate_launch_itself(files, one_process, tmp_path, name, ranks):
    given = ["--config_file", str(LAUNCH / name), f"--num_processes={ranks}", *HERE.get(name, ())]
    given += ["--main_process_port=0", "-m", "tests.cpu_rank"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *given]
    command += share(files, tmp_path / "run", ranks)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    check_same(tmp_path / "run", one_process)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("fsdp", {"tp": 2}, r"tp_size \(=2\) must be 1: tensor parallelism .*fsdp.yaml"),
        ("fsdp", {"cp": 4}, r"cp_size \(=4\) must be 1 for the stage align, which"),
        ("fsdp", {"sp": 2}, r"sp_size \(=2\) must be 1: sequence parallelism .*fsdp.yaml"),
        ("ddp", {"tp": 2}, r"tp_size \(=2\) must be 1: tensor parallelism .*fsdp.yaml"),
        ("ddp", {"dp_shard": 2}, r"dp_shard_size \(=2\) need FSDP: add .*fsdp.yaml"),
        ("fsdp", {"dp_shard": 2}, r"dp_shard_size \(=2\) must .* number of processes \(=4\)"),
        ("fsdp", {"dp_replicate": 4}, r"\(=4\) and .*dp_shard_size \(=1\) must .* two parts or"),
    ],
)
def test_parts_of_a_model_or_a_sequence_are_refused(tmp_path, monkeypatch, name, sizes, message):
    lines = [f"  parallelism_config_{key}_size: {size}\n" for key, size in sizes.items()]
    file = tmp_path / "launch.yaml"
    shipped = (LAUNCH / f"{name}.yaml").read_text()
    file.write_text("".join([shipped, "parallelism_config:\n", *lines]))
    variables = launched(file) | {"WORLD_SIZE": "4"}
    is_refused(tmp_path, monkeypatch, variables, f"parallelism_config_.*{message}")


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            r"distributed_type \(=DEEPSPEED, ZeRO stage 3\) is not supported: .*fsdp.yaml",
        ),
        (
            DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "a.json"},
            r"distributed_type \(=DEEPSPEED, config a.json\) is not supported",
        ),
        (DEEPSPEED, r"distributed_type \(=DEEPSPEED, ZeRO stage by default\)"),
        (
            {"ACCELERATE_USE_MEGATRON_LM": "true"},
            r"distributed_type \(=MEGATRON_LM\) is not supported: .*fsdp.yaml",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, r"fsdp_version \(=1\) must be 2: version 1 hides"),
        (
            launched(LAUNCH / "fsdp.yaml", "--fsdp_activation_checkpointing=true"),
            r"fsdp_activation_checkpointing \(=true\) .* extend .* set it to false",
        ),
        (
            launched(LAUNCH / "fsdp.yaml", "--fsdp_auto_wrap_policy=NO_WRAP"),
            r"fsdp_auto_wrap_policy \(=NO_WRAP\) must be TRANSFORMER_BASED_WRAP, .* align needs",
        ),
        (
            launched(LAUNCH / "fsdp.yaml", "--fsdp_transformer_layer_cls_to_wrap=Block"),
            r"fsdp_transformer_layer_cls_to_wrap \(=Block\) must be left out, .* align needs",
        ),
        (
            launched(LAUNCH / "fsdp.yaml") | {"ACCELERATE_USE_CPU": "true"},
            r"distributed_type \(=FSDP\) would be NO here and shard nothing: .*ddp.yaml",
        ),
        (
            launched(LAUNCH / "ddp.yaml", "--mixed_precision=fp16"),
            r"mixed_precision \(=fp16\) has no effect, .* precision \(=fp32\) .* set .* to no",
        ),
        (
            launched(LAUNCH / "one_gpu.yaml", "--dynamo_backend=inductor"),
            r"dynamo_backend \(=INDUCTOR\) is not supported, .* set it to no",
        ),
    ],
)
def test_other_trainers_are_refused(tmp_path, monkeypatch, variables, message):
    is_refused(tmp_path, monkeypatch, variables, message)


@pytest.mark.parametrize("kind", ["MULTI_XPU", "MULTI_NPU", "XLA", "DEEPSPEED", "MEGATRON_LM"])
def test_machines_that_were_never_tried_are_refused(kind):
    message = rf"distributed_type \(={kind}\) is not supported, .* one process, .*ddp.yaml"
    with pytest.raises(UserError, match=message):
        check_kind(DistributedType(kind))


def is_refused(tmp_path, monkeypatch, variables, message):
    """Check that a setting is refused by name, before a model is opened."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    first, *others = settings(tmp_path / "nowhere", tmp_path / "run", 1)
    stages = "tune=null", "align={tokens: 1}", "extend={}"
    config = load_config(first.removeprefix("--config="), [*others, *stages])
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


def test_efficient_loading_of_ones_own_configuration_is_put_out(monkeypatch):
    environment = launched(LAUNCH / "fsdp.yaml", "--fsdp_cpu_ram_efficient_loading=true")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    assert fsdp_plugin().cpu_ram_efficient_loading is False
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False"  # which transformers reads
