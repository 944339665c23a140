"""Weights on the disk change no bit of logits and states, and no text."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import supra
from supra.conversion.convert import convert
from supra.mixers import MIXERS
from supra.testing import tiny_checkpoint
from tests.native_models import SIZES, native_model

IDS = torch.arange(1, 39).reshape(2, 19)
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
# one layer in memory and one on the disk, by the names of a Llama
SPLIT = {
    "model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_checkpoint(folder)
    return folder


@torch.no_grad()
def numbers(model):
    """Logits of the token after a padded batch, and of the batch; its states, and a text."""
    model.eval()
    first = model(IDS, attention_mask=MASK, use_cache=True)
    cache = first.past_key_values
    states = [x for layer in cache.layers for x in getattr(layer, "state", None) or ()]
    states = [x for x in states if x is not None]
    mask = torch.cat([MASK, MASK[:, -1:]], dim=1)
    next_ = model(IDS[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
    text = model.generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False)
    return [next_.logits, first.logits, text, *states]


def assert_equal_bits(offloaded, plain):
    assert "disk" in offloaded.hf_device_map.values()
    assert any(x.is_meta for x in offloaded.parameters()), "nothing is on the disk"
    (found, expected), *pairs = zip(numbers(offloaded), numbers(plain), strict=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)  # one token may round
    for found, expected in pairs:
        assert found.device == expected.device and torch.equal(found, expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_hybrid(mixer, base, tmp_path):
    convert(base, tmp_path / "rnn", mixer=mixer, keep_attention=[] if mixer == "softmax" else [1])
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn", device_map=SPLIT)
    assert_equal_bits(offloaded, AutoModelForCausalLM.from_pretrained(tmp_path / "rnn"))


@pytest.mark.parametrize("mixer", ["mamba2", "h3"])
def test_a_model_that_is_loaded_by_its_own_code(mixer, base, tmp_path):
    convert(base, tmp_path / "rnn", mixer=mixer)
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "rnn", trust_remote_code=True, device_map="auto", max_memory={"cpu": "150KB"}
    )
    assert_equal_bits(offloaded, AutoModelForCausalLM.from_pretrained(tmp_path / "rnn"))


@pytest.mark.parametrize("device_map", [SPLIT, {"": "disk"}], ids=["a part", "all"])
def test_inputs_go_where_the_model_says(device_map, base, tmp_path):
    """Also in speculative decoding, which puts its candidates there."""
    convert(base, tmp_path / "rnn", mixer="supra")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "rnn", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert offloaded.device == torch.device("cpu")
    row, settings = IDS[:1].repeat(1, 2), {"max_new_tokens": 4, "do_sample": False}
    expected = plain.generate(row, **settings)
    found = offloaded.generate(row.to(offloaded.device), prompt_lookup_num_tokens=2, **settings)
    assert torch.equal(found, expected)
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(plain.config).device.type == "meta"


@pytest.mark.parametrize("family", SIZES)
def test_a_native_model_runs_with_our_kernels(family, tmp_path):
    """Its layers get their mixers after Accelerate's hooks are in place."""
    native_model(family).save_pretrained(tmp_path / "native")
    given = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded"}
    plain, offloaded = (
        supra.accelerate(AutoModelForCausalLM.from_pretrained(tmp_path / "native", **x).eval())
        for x in ({}, given)
    )
    with torch.no_grad():
        assert torch.equal(offloaded(IDS).logits, plain(IDS).logits)
    texts = [x.generate(IDS, max_new_tokens=3, do_sample=False) for x in (plain, offloaded)]
    assert torch.equal(*texts)
