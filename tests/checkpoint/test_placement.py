"""Where the weights of an opened model lie, and what is left of it on the disk."""

import gc
from pathlib import Path

import pytest
import torch

from supra.checkpoint.opening import find_checkpoint
from supra.checkpoint.placement import Placement
from supra.cli.arguments import parse_memory
from supra.errors import UserError
from supra.model.loading import load_model
from supra.model.offload import device_of
from supra.testing import tiny_checkpoint

IDS = torch.arange(1, 20)[None]
SMALL = {"cpu": 100_000}  # less than half of the weights of these models


def test_sizes_of_memory():
    read = {"0": 20 * 10**9, "cpu": 3 * 2**19, "mps": 2**30}
    found = parse_memory("--max-memory", "0=20GB, cpu=1.5MiB,mps=1gib")
    assert {str(device): size for device, size in found.items()} == read
    assert 0 in found, "the number of a GPU is an integer"


@torch.no_grad()
def test_the_whole_model_lies_where_one_device_is_named(tmp_path):
    plain = tiny_checkpoint(tmp_path / "base")
    model = find_checkpoint(str(tmp_path / "base"), placement=Placement("cpu")).model()
    assert {x.device.type for x in model.parameters()} == {"cpu"} and device_of(model).type == "cpu"
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


@torch.no_grad()
def test_a_small_memory_holds_a_part_and_the_disk_the_rest(tmp_path):
    plain = tiny_checkpoint(tmp_path / "base", "gpt_neox")
    model = load_model(
        find_checkpoint(str(tmp_path / "base"), placement=Placement("auto", SMALL)), None
    )
    held = sum(x.nbytes for x in model.parameters() if not x.is_meta)
    assert held <= SMALL["cpu"] < sum(x.nbytes for x in plain.parameters()) / 2
    assert device_of(model) == torch.device("cpu")
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


@torch.no_grad()
def test_two_models_share_an_offload_folder_until_they_go(tmp_path):
    """Experts are stored one by one and fused in the model, so they are written anew."""
    where = Placement("auto", SMALL, tmp_path / "away")
    for seed in (0, 1):
        tiny_checkpoint(tmp_path / f"{seed}", "mixtral", seed=seed)
    plain = [find_checkpoint(str(tmp_path / f"{seed}")).model() for seed in (0, 1)]
    models = [
        find_checkpoint(str(tmp_path / f"{seed}"), placement=where).model() for seed in (0, 1)
    ]
    assert len(list((tmp_path / "away").glob("*/*.safetensors"))) >= 4
    for model, expected in zip(models, plain, strict=True):
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    del model, models
    gc.collect()
    assert list((tmp_path / "away").iterdir()) == []


def test_weights_on_the_disk_are_checked_too(tmp_path):
    model = tiny_checkpoint(tmp_path / "base")
    model.lm_head.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "base")
    checkpoint = find_checkpoint(str(tmp_path / "base"), placement=Placement("auto", {"cpu": 0}))
    with pytest.raises(UserError, match=r"lm_head\.weight holds NaN"):
        load_model(checkpoint, None)


def test_nothing_is_left_of_a_model_that_does_not_load(tmp_path):
    def opener(offload_folder, **given):
        Path(offload_folder, "weight.safetensors").write_text("half of it")
        raise UserError("it does not load")

    with pytest.raises(UserError, match="it does not load"):
        Placement("auto", SMALL, tmp_path / "away").open(opener)
    assert list((tmp_path / "away").iterdir()) == []
