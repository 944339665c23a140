"""Static caches: the same text as without, from one graph for all tokens of all calls."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

from supra.errors import UserError
from supra.mixers import MIXERS
from supra.mixers.state_policy import StatePolicy
from supra.model.attention import attention_modules
from supra.model.cache import StaticMixerLayer
from supra.model.compiled_decoding import check_compilable, compiled_decoding
from supra.states import fork_state
from supra.testing import tiny_config, untrained_model
from tests.native_models import native_model

# A window that fills while tokens are written, a sink and a cap; and layers of two kinds
FAMILIES = {"mistral": {"sliding_window": 7}, "gpt_oss": {}, "gemma2": {}}
STATIC = {"cache_implementation": "static"}


def model_of(mixer, family="llama", **overrides):
    model = untrained_model(tiny_config(family, **overrides), mixer).eval()
    generator = torch.Generator().manual_seed(0)
    for x in model.parameters():
        x.data += 0.05 * torch.randn(x.shape, generator=generator)
    return model


def written(model, tokens=12, new=9, **options):
    """The text after three prompts. The two shorter ones are padded on the left."""
    ids = torch.randint(1, 90, (3, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, 0] = 0, 0
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None} | options
    return model.generate(ids, attention_mask=mask, pad_token_id=0, **options)


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_static_cache_writes_the_same_text(mixer):
    model = model_of(mixer)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 5}):
        if options:
            options["max_new_tokens"] = 5
        assert torch.equal(written(model, **STATIC, **options), written(model, **options))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixer", ["softmax", "mamba2"])
def test_a_compiled_step_knows_windows_sinks_and_caps(family, mixer):
    model = model_of(mixer, family, **FAMILIES[family])
    assert torch.equal(written(model, **compiled_decoding("eager")), written(model))
    assert graphs() == 1


@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet", "window", "h3", "softmax"])
def test_one_graph_serves_all_tokens_of_all_calls(mixer):
    """Neither another prompt nor another answer of at most the first length compiles anew."""
    model = model_of(mixer)
    options = compiled_decoding("aot_eager" if mixer == "mamba2" else "eager")
    options["compile_config"].fullgraph = True
    assert torch.equal(written(model, **options), written(model))
    for tokens, new in ((9, 11), (5, 3)):
        assert torch.equal(written(model, tokens, new, **options), written(model, tokens, new))
    assert graphs() == 1 and not counters["graph_break"]


def test_inductor_writes_the_same_text():
    model = model_of("mamba2", num_hidden_layers=1)
    assert torch.equal(written(model, new=4, **compiled_decoding()), written(model, new=4))
    assert graphs() == 1


@torch.no_grad()
def test_a_static_cache_goes_on_after_more_than_one_token():
    """Ring buffers of a window are put in order again."""
    model = model_of("softmax", "mistral", sliding_window=7)
    ids = torch.randint(1, 90, (2, 29), generator=torch.Generator().manual_seed(0))
    cache, expected = StaticCache(config=model.config, max_cache_len=40), model(ids).logits
    for begin, end in ((0, 4), *((n, n + 1) for n in range(4, 15)), (15, 18), (18, 19), (19, 29)):
        found = model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(found, expected[:, begin:end], atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == 29 and isinstance(cache.layers[0], StaticMixerLayer)


@torch.no_grad()
def test_what_a_static_cache_cannot_do_says_so():
    model, ids = model_of("softmax"), torch.arange(1, 7)[None]
    cache = StaticCache(config=model.config, max_cache_len=6)
    model(ids, past_key_values=cache, use_cache=True)
    for more in (ids[:, :1], ids):
        with pytest.raises(UserError, match=r"max_cache_len \(=6\) of the static cache"):
            model(more, past_key_values=cache, use_cache=True)
    with pytest.raises(UserError, match="without cache_implementation"):
        fork_state(cache)
    with pytest.raises(UserError, match="cannot roll back"):
        cache.activate_past_recording()


def test_a_policy_that_looks_back_is_not_compiled():
    model = model_of("supra")
    for attention in attention_modules(model):
        attention.mixer.set_policy(StatePolicy(window=4), attention.layer_idx)
    assert torch.equal(written(model, **STATIC), written(model))
    with pytest.raises(UserError, match="pass disable_compile=True"):
        written(model, **compiled_decoding("eager"))


def test_models_that_cannot_be_compiled_are_named():
    model = model_of("mamba2")
    check_compilable(model, "--compile")
    model.hf_device_map = {"": 0, "lm_head": "disk"}
    with pytest.raises(UserError, match="weights on 0, disk are moved"):
        check_compilable(model, "--compile")
    with pytest.raises(UserError, match="'mamba2' keeps its states in a cache"):
        check_compilable(native_model("mamba2"), "--compile")
