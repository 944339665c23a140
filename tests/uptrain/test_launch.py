"""recipes/launch/: every file on two ranks, against one process that reads the same rows."""

import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
from supra.uptrain.accelerator import fsdp_plugin
from tests import cpu_rank

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"
LENGTH = 32
STEPS = 3
PER_STEP = 4  # rows

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


def settings(files, out, rows):
    return [
        f"--config={ROOT}/recipes/configs/smoke.yaml",
        f"student={files}/student",
        f"data={{path: {files}/text.jsonl, sequence_length: {LENGTH}, eval_documents: 0}}",
        f"out={out}",
        "eval.every=0",
        f"budget.tokens={STEPS * PER_STEP * LENGTH}",
        "precision=fp32",
        f"batch={{size: {rows}, accumulation: 2}}",
    ]


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    first, *others = settings(files, out, PER_STEP // 2)
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


def run_ranks(arguments, environment, count=2):
    """Run on this many CPU ranks; returns their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = environment | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
    }
    ranks = [
        context.Process(
            target=cpu_rank.run,
            args=(arguments, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
        )
        for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
    for rank in ranks:
        rank.kill()
    return [rank.exitcode for rank in ranks]


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").open()]


def check_same(out, reference):
    lines, expected = logged(out), logged(reference)
    assert len(lines) == len(expected) == STEPS
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    result, wanted = (load_file(x / "final" / "model.safetensors") for x in (out, reference))
    assert result.keys() == wanted.keys()
    for name, value in result.items():
        assert (value - wanted[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("name", ["one_gpu.yaml", "ddp.yaml", "fsdp.yaml"])
def test_a_launch_file_trains_as_one_process_does(files, one_process, tmp_path, name):
    ranks = 1 if name == "one_gpu.yaml" else 2
    environment = launched(LAUNCH / name, f"--num_processes={ranks}")
    arguments = settings(files, tmp_path / "run", PER_STEP // 2 // ranks)
    assert run_ranks(arguments, environment, ranks) == [0] * ranks
    check_same(tmp_path / "run", one_process)


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


@pytest.mark.long  # ten seconds each, most of them imports
@pytest.mark.parametrize("name", ["one_gpu.yaml", "ddp.yaml", "fsdp.yaml"])
def test_accelerate_launch_itself(files, one_process, tmp_path, name):
    ranks = 1 if name == "one_gpu.yaml" else 2
    given = ["--config_file", str(LAUNCH / name), f"--num_processes={ranks}"]
    given += ["--main_process_port=0", "-m", "tests.cpu_rank"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *given]
    command += settings(files, tmp_path / "run", PER_STEP // 2 // ranks)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    check_same(tmp_path / "run", one_process)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "tp_size: 2",
            r"parallelism_config_tp_size \(=2\) must be 1: tensor parallelism .*fsdp.yaml",
        ),
        ("cp_size: 4", r"parallelism_config_cp_size \(=4\) must be 1: context parallelism .*fsdp"),
        ("sp_size: 2", r"parallelism_config_sp_size \(=2\) must be 1: sequence parallelism .*fsdp"),
    ],
)
def test_parts_of_a_model_or_a_sequence_are_refused(tmp_path, monkeypatch, section, message):
    file = tmp_path / "launch.yaml"
    own = f"parallelism_config:\n  parallelism_config_{section}\n"
    file.write_text((LAUNCH / "fsdp.yaml").read_text() + own)
    is_refused(tmp_path, monkeypatch, launched(file), message)


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
    ],
)
def test_other_trainers_are_refused(tmp_path, monkeypatch, variables, message):
    is_refused(tmp_path, monkeypatch, variables, message)


def is_refused(tmp_path, monkeypatch, variables, message):
    """Check that a setting is refused by name, before a model is opened."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    first, *others = settings(tmp_path / "nowhere", tmp_path / "run", 1)
    config = load_config(first.removeprefix("--config="), [*others, "tune=null", "extend={}"])
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
