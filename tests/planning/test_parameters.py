"""Parameters by kind, and which of them a stage trains."""

import pytest
import torch

from supra.mixers import resolve_mixer
from supra.model.auto import converted_config
from supra.planning.parameters import count, kinds_of, products, trainable_student
from supra.testing import tiny_config, untrained_model
from supra.uptrain.config import LoraConfig, UptrainConfig
from supra.uptrain.optim import trainable
from supra.uptrain.stage_settings import AlignConfig, OptimizerConfig

D, QUERY, KEY, INNER, WORDS, LAYERS = 48, 48, 16, 80, 300, 2


def student(config, **changes):
    base = tiny_config(**changes)
    mixer, options = resolve_mixer("mamba2")
    return trainable_student(
        converted_config(base, [mixer] * LAYERS, {mixer: options}),
        UptrainConfig(student="s", out="o", **config),
    )


def test_kinds_add_up_to_the_real_model():
    model = student({})
    kinds = kinds_of(model)
    found = count(kinds, kinds)
    real = untrained_model(tiny_config(), "mamba2")
    new = sum(x.numel() for name, x in real.named_parameters() if ".mixer." in name)
    assert found == {
        "embeddings": WORDS * D,
        "attention": LAYERS * (D * QUERY + 2 * D * KEY + QUERY * D),
        "mixers": new,
        "feed-forward": LAYERS * 3 * D * INNER,
        "norms and biases": (2 * LAYERS + 1) * D,
        "head": WORDS * D,
    }
    assert sum(found.values()) == sum(x.numel() for x in real.parameters())
    assert all(x.dtype == torch.float32 for x in kinds)


@pytest.mark.parametrize(("tied", "looked_up"), [(True, 0), (False, WORDS * D)])
def test_a_tied_head_counts_once_and_multiplies(tied, looked_up):
    model = student({}, tie_word_embeddings=tied)
    kinds = kinds_of(model)
    assert ("head" in count(kinds, kinds)) == (not tied)
    matrices = sum(x.numel() for x in kinds if x.ndim > 1)
    assert products(kinds, model, kinds) == matrices - looked_up


def test_align_trains_attention_alone():
    align = AlignConfig(optimizer=OptimizerConfig(lr=1e-3))
    model = student({"align": align})
    trained = dict(trainable(model, {"align": align}))
    assert set(count(trained, kinds_of(model))) == {"attention", "mixers"}


def test_adapters():
    model = student({"lora": LoraConfig(rank=2)})
    kinds = kinds_of(model)
    found = count(kinds, kinds)
    # q and o: 48 to 48; k and v: 48 to 16
    assert found["adapters"] == LAYERS * 2 * (2 * (D + QUERY) + 2 * (D + KEY))
    assert found["frozen copies"] == found["mixers"]
    assert {kinds[x] for x in kinds if x.requires_grad} == {"adapters", "mixers"}
    assert all(x.is_meta for x in kinds)
