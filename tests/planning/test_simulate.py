"""The arithmetic of memory against torch's tracker, on ranks that do not exist."""

import pytest
import torch.distributed as dist

from supra.planning.hardware import Gpus, Hardware, Rate
from supra.planning.plan import plan
from supra.planning.settings import Conversion, find_models, read_settings
from supra.testing import tiny_config

SIZES = {  # blocks and vocabulary as large as those of a 1B
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
TUNE = ("align=null", "distill=null", "tune.share=1.0")
STAGES = ["align.share=0.1", "tune.share=0.2", "distill.share=0.7", "batch.size=4"]


def simulated(folder, hardware, *overrides, layers=3):
    tiny_config(num_hidden_layers=layers, **SIZES).save_pretrained(folder)
    conversion = Conversion(str(folder), "mamba2", {})
    config = read_settings("supra", [*STAGES, *overrides], conversion)
    models = find_models(config, conversion)
    return plan(config, models, hardware, Rate(), simulated=True).stages


@pytest.mark.parametrize(
    ("hardware", "overrides"),
    [
        (Hardware(Gpus(2, 80), 1, "ddp"), ()),
        (
            Hardware(Gpus(4, 80), 2, "hsdp"),
            ("gradient_checkpointing=true", "batch.accumulation=3", *TUNE),
        ),
    ],
    ids=["ddp", "hsdp"],
)
def test_within_a_tenth(tmp_path, hardware, overrides):
    for stage in simulated(tmp_path, hardware, *overrides):
        assert stage.memory.peak == pytest.approx(stage.simulated.peak, rel=0.1), stage.name
    assert not dist.is_initialized()


@pytest.mark.long  # minutes
@pytest.mark.parametrize("launch", ["ddp", "fsdp"])
def test_a_1b_on_eight_gpus(tmp_path, launch):
    for stage in simulated(tmp_path, Hardware(Gpus(8, 80), 1, launch), layers=22):
        assert stage.memory.peak == pytest.approx(stage.simulated.peak, rel=0.1), stage.name
