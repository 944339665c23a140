"""State policies on whole models: set in the config, at load, or for some calls; saved; decoded."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from supra.conversion.convert import convert
from supra.errors import UserError
from supra.long_context import StatePolicy, set_policy, use_policy
from supra.states import fork_state, load_state, save_state
from supra.testing import tiny_checkpoint, tiny_config, untrained_model

IDS = torch.randint(300, (2, 90), generator=torch.Generator().manual_seed(0))
WINDOW = StatePolicy(window=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_checkpoint(folder / "base")
    convert(folder / "base", folder / "rnn", mixer="mamba2", keep_attention=[1])
    return folder / "rnn"


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


def test_config_load_and_call_agree(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = logits(model)
    with use_policy(model, WINDOW):
        expected = logits(model)
    assert torch.equal(logits(model), plain)
    assert not torch.allclose(expected, plain, atol=1e-3)
    loaded = AutoModelForCausalLM.from_pretrained(folder, state_policy={"window": 16}).eval()
    assert torch.equal(logits(loaded), expected)
    set_policy(model, WINDOW)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), expected)
    assert again.config.state_policy["window"] == 16
    free = AutoModelForCausalLM.from_pretrained(tmp_path, state_policy=None).eval()
    set_policy(free, None)
    assert torch.equal(logits(free), plain)


def test_a_config_without_a_policy_has_none_on_disk(folder):
    assert "state_policy" not in (folder / "config.json").read_text()
    assert AutoConfig.from_pretrained(folder).state_policy is None


@pytest.mark.parametrize("policy", [WINDOW, StatePolicy(norm=0.2, norm_every=8)])
def test_decode_is_prefill(folder, policy):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with use_policy(model, policy), torch.no_grad():
        generated = model.generate(IDS[:, :40], max_new_tokens=30, do_sample=False)
        for at in range(40, 70):
            assert torch.equal(logits(model, generated[:, :at])[:, -1].argmax(-1), generated[:, at])


def test_two_layers_see_further_than_one():
    """Each layer's window is exact; the second layer reads the outputs of the first layer's
    window."""
    for layers, far in ((1, False), (2, True)):
        model = untrained_model(tiny_config(num_hidden_layers=layers), "hedgehog").double().eval()
        set_policy(model, WINDOW)
        embeddings = model.get_input_embeddings()(IDS[:1]).detach().requires_grad_()
        output = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1].sum()
        (gradient,) = torch.autograd.grad(output, embeddings)
        reached = gradient[0].abs().amax(-1) > 1e-10 * gradient.abs().max()
        assert reached[90 - 16 :].all()
        assert reached[: 90 - 16].any() == far
        assert not reached[: 90 - 31].any()
        with torch.no_grad():
            places = torch.arange(90 - 16, 90)[None]
            whole, last = logits(model)[:1], model(IDS[:1, 74:], position_ids=places).logits
        assert torch.allclose(whole[0, -1], last[0, -1], rtol=0, atol=1e-10) != far


def test_states_are_saved_and_forked_with_their_past(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, state_policy={"window": 16}).eval()
    with torch.no_grad():
        expected = model(IDS).logits[:, 50:]
        cache = model(IDS[:, :50], use_cache=True).past_key_values
        save_state(cache, tmp_path / "state.safetensors")
        loaded = load_state(tmp_path / "state.safetensors", model)
        for state in (fork_state(cache), loaded):
            found = model(IDS[:, 50:], past_key_values=state).logits
            assert torch.allclose(found, expected, atol=1e-4)
    with pytest.raises(UserError, match="other mixers, or another state_policy"):
        set_policy(model, None)
        load_state(tmp_path / "state.safetensors", model)


def test_what_cannot_act_changes_nothing(tmp_path):
    model = untrained_model(tiny_config(), "gated_delta")
    set_policy(model, StatePolicy(decay_scale=0.9))
    with pytest.raises(UserError, match=r"window \(=16\) cannot act on layer 0 \(gated_delta\)"):
        set_policy(model, WINDOW)
    assert model.config.state_policy["decay_scale"] == 0.9
    assert model.model.layers[0].self_attn.mixer.policy.decay_scale == 0.9
    with pytest.raises(UserError, match=r"state_policy: 'windw' is none of decay_scale"):
        tiny = untrained_model(tiny_config(), "supra")
        tiny.config.state_policy = {"windw": 3}
        tiny.save_pretrained(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path)
