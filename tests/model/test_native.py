"""Recurrent models of transformers in the words of mixers, and supra's kernels in their layers."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import supra
from supra.errors import UserError
from supra.long_context import StatePolicy, use_policy
from supra.model.cache import MixerLayer, cache_in
from supra.model.native.adapter import adopt, documents_apart, empty_cache
from supra.testing import tiny_config, untrained_model
from tests.native_models import SIZES, native_model

IDS = torch.randint(300, (2, 45), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :7] = 0
FAMILIES = pytest.mark.parametrize("family", SIZES)


@torch.no_grad()
def logits(model, ids=IDS, **inputs):
    return model(ids, use_cache=False, **inputs).logits


@torch.no_grad()
def read(model, *cuts):
    """Logits of the tokens, read in pieces with a cache; and that cache."""
    cache, found = {}, []
    for start, end in zip((0, *cuts), (*cuts, IDS.shape[1]), strict=True):
        places = torch.arange(start, end).expand(len(IDS), -1)
        output = model(IDS[:, start:end], position_ids=places, use_cache=True, **cache)
        cache = cache_in(output)
        found.append(output.logits)
    (cache,) = cache.values()
    return torch.cat(found, dim=1), cache


def assert_close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@FAMILIES
def test_accelerated_logits_are_those_of_transformers(family):
    """In prefill, decoding, pieces and padding; before acceleration bit for bit."""
    model = native_model(family)
    padded = {"attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)}
    plain, with_padding = logits(model), logits(model, **padded)
    names = [*model.state_dict()]
    assert [*adopt(model)] and torch.equal(logits(model), plain)
    assert supra.accelerate(model) is model and [*model.state_dict()] == names
    assert_close(logits(model), plain)
    assert not torch.equal(logits(model), plain), "other kernels round otherwise"
    assert_close(logits(model, **padded)[MASK.bool()], with_padding[MASK.bool()])
    found, cache = read(model, 20, 33, 34, 35)
    assert_close(found, plain)
    assert cache.get_seq_length() == IDS.shape[1]
    assert isinstance(cache.layers[0], MixerLayer)


def test_one_group_of_heads():
    """As in published Mamba-2: all heads share a key and a query."""
    model = native_model("mamba2", n_groups=1)
    plain = logits(model)
    supra.accelerate(model)
    for found in (logits(model), read(model, 20, 44)[0]):
        assert_close(found, plain)
    with use_policy(model, StatePolicy(window=45)):
        assert_close(logits(model), plain)


@pytest.mark.parametrize("family", ["mamba2", "bamba", "qwen3_next"])
def test_documents_of_packed_rows(family):
    """Each is what it is alone."""
    model, starts = native_model(family), (0, 13, 45, 60, 90)
    places = torch.cat([torch.arange(b - a) for a, b in pairwise(starts)]).view(2, 45)
    plain = logits(model)
    with documents_apart(model, places):
        found = logits(model, position_ids=places).flatten(0, 1)
    for start, end in pairwise(starts):
        assert_close(found[start:end], logits(model, IDS.flatten()[None, start:end])[0])
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1", "qwen3_next"])
def test_generate_and_beams(family):
    model, settings = native_model(family), {"max_new_tokens": 6, "num_beams": 2}
    settings |= {"attention_mask": MASK, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **settings)
    assert torch.equal(supra.accelerate(model).generate(IDS, **settings), expected)


def test_gradients():
    model, batch = native_model("bamba"), {"input_ids": IDS, "labels": IDS}
    model(**batch, use_cache=False).loss.backward()
    expected = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    supra.accelerate(model)(**batch, use_cache=False).loss.backward()
    for name, x in model.named_parameters():
        assert_close(x.grad, expected[name], 1e-4)


def test_copies_pickles_and_files(tmp_path):
    model = supra.accelerate(native_model("mamba2"))
    plain = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), plain)
        other.backbone.layers[0].mixer.D.data += 1
        assert not torch.equal(logits(other), plain)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again.backbone.layers[0].mixer).__name__ == "Mamba2Mixer"
    assert torch.equal(logits(supra.accelerate(again)), plain)


def test_a_cache_rolls_back():
    """A state cannot forget, so the tokens that stay are read again."""
    model = supra.accelerate(native_model("falcon_h1"))
    expected, _ = read(model)
    cache = empty_cache(model)
    for layer in cache.layers:
        layer.activate_past_recording()
    with torch.no_grad():
        for start, end in ((0, 20), (20, 30)):
            places = torch.arange(start, end)[None]
            model(IDS[:, start:end], position_ids=places, past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 26
        places = torch.arange(26, 45)[None]
        found = model(IDS[:, 26:], position_ids=places, past_key_values=cache).logits
    assert_close(found, expected[:, 26:])


def test_a_cache_of_another_form_is_refused():
    model = native_model("mamba2")
    _, filled = read(model)
    supra.accelerate(model)
    with pytest.raises(UserError, match=r"filled before supra.accelerate\(\).*empty cache"):
        model(IDS, cache_params=filled)
    with pytest.raises(UserError, match=r"no layer 0: make it with DynamicCache\(config=model"):
        model(IDS, cache_params=DynamicCache())
    _, ours = read(model)
    with pytest.raises(UserError, match="states of another form"):
        native_model("mamba2")(IDS, cache_params=ours)


@pytest.mark.parametrize("model", [untrained_model(tiny_config(), "supra")], ids=["converted"])
def test_what_has_no_native_layers(model):
    with pytest.raises(UserError, match=r"model_type 'supra' has no recurrent layers that supra"):
        supra.accelerate(model)
    assert not adopt(model)
