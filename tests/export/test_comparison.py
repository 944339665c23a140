"""Logits of models whose weights are lent to one block at a time."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.export import lent_weights
from supra.export.comparison import PROMPT, STEPS, difference, sample
from supra.export.lent_weights import logits_of
from supra.testing import tiny_checkpoint


@pytest.mark.parametrize("held", [0, 1e9], ids=["streamed", "held"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_lent_weights_give_the_models_logits(tmp_path, monkeypatch, held, tied):
    monkeypatch.setattr(lent_weights, "HELD_BYTES", held)
    tiny_checkpoint(tmp_path / "base", "smollm3", tie_word_embeddings=tied)
    convert(tmp_path / "base", tmp_path / "rnn", mixer="mamba2", keep_attention=[1])
    checkpoint = find_checkpoint(str(tmp_path / "rnn"))
    tokens = sample(checkpoint, None, "text")
    assert tokens.shape == (1, PROMPT + STEPS)
    config = checkpoint.config()
    found = logits_of(config, checkpoint.tensors(config).load, tokens, STEPS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn", dtype=torch.float32)
    expected = model(tokens, use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_streaming_reads_a_block_for_every_call_and_drops_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lent_weights, "HELD_BYTES", 0)
    tiny_checkpoint(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "rnn", mixer="softmax")
    checkpoint = find_checkpoint(str(tmp_path / "rnn"))
    config, read = checkpoint.config(), []
    load = checkpoint.tensors(config).load
    tokens = sample(checkpoint, None, "text")
    logits_of(config, lambda name: (read.append(name), load(name))[1], tokens, STEPS)
    assert read.count("model.layers.1.mlp.up_proj.weight") == 1 + STEPS


def test_differences_are_relative_to_the_largest_logit():
    logits = torch.zeros(PROMPT + STEPS, 5)
    logits[0, 0] = -4.0
    others = logits.clone()
    others[PROMPT - 1, 2] += 1.0
    others[PROMPT, 3] -= 0.5
    found = difference(logits, others)
    assert (found.prompt, found.steps, found.largest) == (0.25, 0.125, 0.25)
    assert difference(logits, logits).largest == 0
    assert not difference(logits, logits * torch.nan).largest <= 1e-3


def test_the_default_text_is_always_there(tmp_path):
    tiny_checkpoint(tmp_path / "base")
    checkpoint = find_checkpoint(str(tmp_path / "base"))
    tokens = sample(checkpoint, None, "text")
    assert len(checkpoint.tokenizer().decode(tokens[0]).split()) > 20
