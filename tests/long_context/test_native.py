"""The long-context tools on models that are recurrent in transformers itself."""

import json

import datasets
import pytest
import torch
from torch.nn import functional as F

from supra.cli import main
from supra.errors import UserError
from supra.long_context import StatePolicy, set_policy, use_policy
from supra.long_context.statistics import DecaySums, RecurrentLayers
from supra.long_context.stream import Reader
from supra.model.native.adapter import adopt, empty_cache
from tests.native_models import native_checkpoint, native_model

IDS = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(0))
LAYERS = {"mamba2": ([0, 1], []), "bamba": ([0], [1]), "qwen3_next": ([0], [1]),
          "falcon_h1": ([0, 1], [])}  # fmt: skip
FAMILIES = pytest.mark.parametrize("family", LAYERS)
SUMS = pytest.mark.parametrize("family", ["mamba2", "bamba", "falcon_h1"])


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


def slow_heads(model):
    """Decays so near 1 that what lies before a window counts."""
    for layer in adopt(model).values():
        layer.A_log.data.fill_(-4)
        layer.dt_bias.data.fill_(-2)
    return model


@FAMILIES
def test_a_reader_knows_states_and_decays(family):
    """Losses are those of transformers, states those in its cache, decays those of its gates."""
    model, ids = native_model(family), IDS[0]
    plain = F.cross_entropy(logits(model)[0, :-1], ids[1:], reduction="none")
    with torch.no_grad():
        output = model(ids[None], use_cache=True)
    theirs = getattr(output, "past_key_values", None) or output.cache_params
    layers = RecurrentLayers.of(model)
    assert ([*layers.mixers], layers.kept) == LAYERS[family]
    sums, reader = DecaySums(layers), Reader(model)
    with sums.watching(len(ids)):
        places, nats = zip(*(reader.read(piece) for piece in ids.split(17)), strict=True)
    assert torch.equal(torch.cat(places), torch.arange(1, len(ids)))
    torch.testing.assert_close(torch.cat(nats), plain, rtol=1e-4, atol=1e-4)
    for index, state in layers.states(reader).items():
        expected = theirs.layers[index].recurrent_states[0][0]
        expected = expected if family == "qwen3_next" else expected.mT  # [heads, V, K]
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
        assert sums.sums[index].shape == (4, 1) and (sums.sums[index] < 0).all()


def test_decays_are_those_of_the_gates():
    model = native_model("mamba2", num_hidden_layers=1)
    layer = model.backbone.layers[0]
    with torch.no_grad():
        hidden = layer.norm(model.backbone.embeddings(IDS[0]))
        steps = F.softplus(layer.mixer.in_proj(hidden)[:, -4:] + layer.mixer.dt_bias)
        expected = -(layer.mixer.A_log.exp() * steps).sum(0).double()
    sums = DecaySums(RecurrentLayers.of(model))
    with sums.watching(60):
        Reader(model).read(IDS[0])
    torch.testing.assert_close(sums.sums[0][:, 0], expected, rtol=1e-5, atol=0)


@FAMILIES
def test_policies_act_and_go(family):
    """Scale 1 is bit for bit no policy; each other policy changes what it should, and only while it
    is set. The delta rule refuses two."""
    model = slow_heads(native_model(family))
    plain = logits(model)
    with use_policy(model, StatePolicy(decay_scale=1.0, insert_scale=1.0)):
        assert torch.equal(logits(model), plain)
    policies = [StatePolicy(decay_scale=0.9), StatePolicy(norm=0.1, norm_every=8),
                StatePolicy(window=9), StatePolicy(insert_scale=0.5)]  # fmt: skip
    for policy in policies[: 2 if family == "qwen3_next" else 4]:
        with use_policy(model, policy):
            bounded = logits(model)
            generated = model.generate(
                IDS[:, :30], attention_mask=torch.ones_like(IDS[:, :30]), max_new_tokens=9,
                do_sample=False, eos_token_id=None,
            )  # fmt: skip
            again = logits(model, generated[:, :-1])[:, 29:].argmax(-1)
        assert (bounded - plain).abs().max() > 1e-4, policy
        assert torch.equal(generated[:, 30:], again), "decoding is prefill"
        assert torch.equal(logits(model), plain)
    if family == "qwen3_next":
        for policy in policies[2:]:
            with pytest.raises(UserError, match=r"cannot act on layer 0 \(gated_deltanet\): "):
                set_policy(model, policy)
        assert torch.equal(logits(model), plain)


def states_of(model, hidden, state=None):
    """The state of the first layer after its inputs [B, T, D], which follow those in `state`."""
    layer, cache = adopt(model)[0], empty_cache(model)
    cache.layers[0].state = state
    with torch.no_grad():
        layer(hidden, cache)
    return cache.layers[0].state


@SUMS
def test_a_window_is_the_last_tokens(family):
    """In one layer and float64, the state is that of the last r tokens alone; the tokens before
    them are in the state of the short convolution only."""
    model, size = slow_heads(native_model(family, torch.float64)), 13
    hidden = torch.randn(2, 70, 32, dtype=torch.float64)
    before = states_of(model, hidden[:, :-size])
    empty = before._replace(memory=torch.zeros_like(before.memory))
    expected = states_of(model, hidden[:, -size:], empty).memory
    far = states_of(model, hidden).memory
    with use_policy(model, StatePolicy(window=size)):
        found = states_of(model, hidden).memory
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (found - far).abs().max() > 1e-3 * far.abs().max()


@FAMILIES
def test_the_norm_is_bounded(family):
    model = slow_heads(native_model(family))
    hidden = torch.randn(2, 64, 32)
    largest = states_of(model, hidden).memory.flatten(2).norm(dim=-1).max().item()
    with use_policy(model, StatePolicy(norm=largest / 4, norm_every=16)):
        norms = states_of(model, hidden).memory.flatten(2).norm(dim=-1)
    assert norms.max() == pytest.approx(largest / 4, rel=1e-5)


@pytest.mark.parametrize("family", ["mamba2", "bamba", "qwen3_next"])
def test_diagnose_and_fix(family, tmp_path, capsys):
    """The command looks at every head and tries every cure; the delta rule refuses four."""
    folder, text = native_checkpoint(tmp_path / family, family), tmp_path / "text.txt"
    text.write_text("The river rises in the hills. " * 40)
    words = ["diagnose", folder, "--text", text, "--to", 128, "--trained-length", 32, "--json"]
    main([str(x) for x in [*words, "--fix", "auto", "--fix-to", 64]])
    found = json.loads(capsys.readouterr().out)
    layers, kept = LAYERS[family]
    assert len(found["heads"]) == 4 * len(layers) and found["kept_attention"] == kept
    trials = found["fix"]["trials"]
    refused = [x["name"] for x in trials if x["beyond"] is None]
    assert len(refused) == (4 if family == "qwen3_next" else 0)


def test_a_policy_in_the_config_acts_in_every_command(tmp_path, capsys):
    folder, text = native_checkpoint(tmp_path / "mamba2", "mamba2"), tmp_path / "text.txt"
    text.write_text("The river rises in the hills. " * 40)
    words = ["eval", "text", "--model", str(folder), "--text", str(text), "--json"]
    words += ["--sequence-length", "128"]
    main(words)
    plain = json.loads(capsys.readouterr().out)["loss"]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"state_policy": {"decay_scale": 0.5}}))
    main(words)
    assert abs(json.loads(capsys.readouterr().out)["loss"] - plain) > 1e-5
    path.write_text(json.dumps(config | {"state_policy": {"windw": 5}}))
    with pytest.raises(SystemExit):
        main(words)
    assert "state_policy: 'windw' is none of" in capsys.readouterr().err
