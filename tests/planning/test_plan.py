"""`supra plan`, as it is typed."""

import json
from pathlib import Path

import pytest

from supra.cli import main
from supra.planning.hardware import LAUNCHES
from supra.planning.plan import flops_per_token
from supra.planning.settings import read_settings
from supra.testing import tiny_config

RUN = ["plan", "--config", "supra", "--mixer", "mamba2", "--gpus", "2x80GB"]


@pytest.fixture
def teacher(tmp_path):
    """A folder with a config.json and nothing else."""
    tiny_config(max_position_embeddings=1024).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def planned(capsys, *words):
    main([*RUN, *words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_config_alone_is_planned(teacher, capsys):
    found = planned(capsys, "--model", teacher, "--tflops", "1", "--mfu", "0.5", "--price", "2")
    align, distill = found["stages"]
    assert found["fits"] and not align["remedies"]
    # 2 processes x 16 rows x 512 tokens; 2 and 8 million tokens in whole steps
    assert align["tokens_per_step"] == distill["tokens_per_step"] == 16384
    assert (align["steps"], align["tokens"]) == (123, 123 * 16384)
    assert align["tokens"] + distill["tokens"] >= 10_000_000
    parameters = sum(found["parameters"].values())
    assert sum(distill["trained"].values()) == parameters > sum(align["trained"].values())
    assert distill["memory"]["parts"]["weights"] == 4 * parameters
    assert distill["memory"]["parts"]["optimizer"] == 8 * parameters
    assert distill["hours"] == pytest.approx(distill["flops"] / (2 * 0.5e12 * 3600))
    assert found["cost"] == pytest.approx(2 * 2 * found["hours"])


def test_mfu_counts_the_flops_of_the_plan(teacher, capsys):
    main(["plan", "--config", "smoke", "--gpus", "1x80GB", f"student={teacher}", "--json"])
    (tune,) = json.loads(capsys.readouterr().out)["stages"]
    found = flops_per_token(read_settings("smoke", [f"student={teacher}"], None))
    assert found == {"tune": tune["flops"] // tune["tokens"]}


def test_the_papers_recipe_fits_a_7b_as_it_is(tmp_path, capsys):
    """On 8 GPUs of 80 GB, with the sizes of Llama 2 7B."""
    sizes = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    tiny_config(**sizes).save_pretrained(tmp_path)
    words = "--config", "supra_paper", "--mixer", "supra_paper", "--model", str(tmp_path)
    main(["plan", *words, "--gpus", "8x80GB", "--launch", "fsdp", "--json"])
    (tune,) = json.loads(capsys.readouterr().out)["stages"]
    assert tune["fits"] and 30e9 < tune["memory"]["peak"] < 60e9


def test_what_to_change(teacher, capsys):
    small = "precision=fp32", "align=null", "distill.share=1.0", "batch.size=4000"
    main([*RUN[:-1], "2x1GB", "--model", teacher, *small])
    out = capsys.readouterr().out
    assert "distill does not fit" in out and ", fits" in out
    changes = [line for line in out.splitlines() if line[:1].isdigit()]
    assert all(change.split(". ")[1].startswith(KNOWN) for change in changes), changes
    assert all(" saves " in change and " leaves " in change for change in changes), changes


KNOWN = (
    "gradient_checkpointing=true", "batch.size=1 batch.accumulation=4000", "distill=null",
    "recipes/launch/fsdp.yaml", "distill.top_k=64 distill.cache=FOLDER", "lora.rank=16",
)  # fmt: skip


def test_what_saves_most_comes_first(teacher, capsys):
    main([*RUN[:-1], "2x1GB", "--model", teacher, "batch.size=8000", "--json"])
    for stage in json.loads(capsys.readouterr().out)["stages"]:
        before, saved = stage["memory"]["peak"], [x["saves"] for x in stage["remedies"]]
        assert not stage["fits"] and saved == sorted(saved, reverse=True) and saved[-1] > 0
        assert all(x["peak"] == before - x["saves"] for x in stage["remedies"])
        if (both := stage["together"]) is not None:
            assert both["change"].count(" + ") and both["peak"] <= 0.9e9
            assert min(x["peak"] for x in stage["remedies"]) > 0.9e9
        else:
            assert stage["remedies"][0]["peak"] <= 0.9e9


def test_rows_on_several_gpus(teacher, capsys):
    """A group of them reads the same rows, and each keeps the activations of its part."""
    end_to_end = "--model", teacher, "align=null", "distill.share=1.0", "--launch", "fsdp"
    (one,), (two,) = (
        planned(capsys, *end_to_end, "--cp-size", size)["stages"] for size in ("1", "2")
    )
    assert one["tokens_per_step"] == 2 * two["tokens_per_step"]
    one, two = (x["memory"]["parts"] for x in (one, two))
    assert two["activations"] == pytest.approx(one["activations"] / 2)
    assert two["weights"] == one["weights"]
    assert refused(capsys, "--model", teacher, "--cp-size", "2", "--launch", "fsdp") == (
        "--cp-size (=2) must be 1 for the stage align"
    )


def test_a_filled_cache_is_in_the_place_of_the_teacher(teacher, capsys):
    words = "--model", teacher, "distill.top_k=8", "distill.cache=kept"
    (_, before), (_, after) = (
        planned(capsys, *words, *more)["stages"] for more in ((), ("--filled-cache",))
    )
    assert before["memory"]["parts"]["teacher"] > 0 == after["memory"]["parts"]["teacher"]
    assert after["flops"] < before["flops"]
    assert refused(capsys, "--model", teacher, "--filled-cache").startswith("--filled-cache")


def refused(capsys, *words):
    """The beginning of the error."""
    with pytest.raises(SystemExit) as error:
        main([*RUN, *words])
    assert error.value.code == 2
    return capsys.readouterr().err.removeprefix("supra: ").removeprefix("error: ").split(",")[0]


def test_nodes_share_the_student_under_fsdp(teacher, capsys):
    end_to_end = "--model", teacher, "--launch", "fsdp", "align=null", "distill.share=1.0"
    (one,), (four,) = (
        planned(capsys, *end_to_end, "--nodes", nodes)["stages"] for nodes in ("1", "4")
    )
    assert four["tokens_per_step"] == 4 * one["tokens_per_step"]
    one, four = (x["memory"]["parts"] for x in (one, four))
    assert four["optimizer"] == pytest.approx(one["optimizer"] / 4, abs=8)
    assert four["teacher"] < one["teacher"]


def test_more_machines_may_be_the_way_out_of_hsdp(tmp_path, capsys):
    """Logits of a large vocabulary fit nowhere, so that every change that helps is listed."""
    tiny_config(vocab_size=200_000).save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--nodes", "3", "--launch", "hsdp", "align=null"]
    main([*RUN[:-1], "2x1GB", *words, "distill.share=1.0"])
    out = capsys.readouterr().out
    assert "recipes/launch/fsdp.yaml: " in out
    assert "Together: " in out and "That is not enough" in out


def test_every_launch_file_is_planned():
    folder = Path(__file__).parents[2] / "recipes" / "launch"
    # long_rows is fsdp with --cp-size
    assert {file.stem for file in folder.iterdir()} == {*LAUNCHES, "long_rows"}


def test_the_table_says_what_it_counts(teacher, capsys):
    main([*RUN, "--model", teacher, "--keep-attention", "1"])
    out = capsys.readouterr().out
    assert "layer 0 mamba2, layer 1 softmax" in out
    for line in ("feed-forward", "optimizer", "copies of weights", "FLOPs", "at the peak"):
        assert line in out
    assert "cost" not in out
