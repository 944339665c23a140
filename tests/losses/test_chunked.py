"""Losses computed in chunks of tokens equal those from all logits, in every family, and so do their
gradients."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from supra import testing
from supra.losses import chunked as head
from supra.losses.chunked import ScoredModel, hidden_states, logits_of
from supra.losses.token_losses import token_losses
from supra.model.families import FAMILIES
from supra.uptrain.config import LoraConfig
from supra.uptrain.lora import add_lora

INPUTS = {"input_ids": torch.arange(24).view(2, 12) * 7 % 300}
LABELS = (torch.arange(24) * 11 % 300).where(torch.arange(24) % 5 > 0, -100)
TEACHER = torch.randn(24, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tiny(family="llama", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = testing.tiny_config(family, **changes)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def loss(logits, rows):
    return token_losses(
        logits, LABELS[rows], TEACHER[rows], next_token_weight=0.3, kl_weight=0.7, temperature=2.0
    )


def whole(model):
    return loss(model(**INPUTS, use_cache=False).logits.flatten(0, 1), slice(0, 24))


def gradients(model, losses):
    model.zero_grad()
    (2 * losses.total).backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def assert_same(model, chunked, expected):
    for name in chunked._fields:
        torch.testing.assert_close(getattr(chunked, name), getattr(expected, name))
    expected, found = gradients(model, expected), gradients(model, chunked)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.fixture(autouse=True)
def chunks_of_seven(monkeypatch):
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 7 * 300)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_losses_and_gradients(tied):
    model = tiny(tie_word_embeddings=tied)
    assert_same(model, ScoredModel(model)(loss, **INPUTS), whole(model))


@pytest.mark.parametrize("family", ["cohere", "gemma2", "granite", "gpt2"])
def test_what_families_do_to_logits(family):
    """Families with scaled logits, capped logits, and another name for the headless model."""
    model = tiny(family).eval()
    assert_same(model, ScoredModel(model)(loss, **INPUTS), whole(model))


def test_a_frozen_head():
    model = tiny()
    model.lm_head.requires_grad_(False)
    assert_same(model, ScoredModel(model)(loss, **INPUTS), whole(model))


def test_adapters():
    model = add_lora(tiny(), LoraConfig(rank=2, targets=("q_proj", "lm_head")))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert_same(model, ScoredModel(model)(loss, **INPUTS), whole(model))


def test_bf16_logits_and_float32_gradients():
    """The head's gradient is added up in float32 over chunks."""
    model = tiny(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, chunked = whole(model), ScoredModel(model)(loss, **INPUTS)
    torch.testing.assert_close(chunked.total, expected.total, rtol=1e-3, atol=0)
    expected, found = gradients(model, expected), gradients(model, chunked)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 0.02, name


def test_checkpointing_inside():
    model = tiny().train()
    expected = whole(model)
    model.activation_checkpointing_enable()
    assert_same(model, ScoredModel(model)(loss, **INPUTS), expected)


def test_without_a_loss_it_is_the_model():
    model = tiny()
    output = ScoredModel(model)(**INPUTS, use_cache=False)
    torch.testing.assert_close(output.logits, model(**INPUTS, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_hidden_states(family):
    model = tiny(family, torch.float32).eval()
    logits = model(**INPUTS, use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(logits_of(model, hidden_states(model, **INPUTS)), logits)
