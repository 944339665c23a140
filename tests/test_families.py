"""The swap itself loses nothing: with the `softmax` mixer a model computes what it did before."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from supra.configuration import converted_config
from supra.convert import FAMILIES
from supra.testing import tiny_config

# a window shorter than the text, where the family has one
WINDOWS = {
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
}
LAYERS = 3


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A random model of the family, and the same weights under the softmax mixer."""
    overrides = WINDOWS.get(request.param, {})
    config = tiny_config(request.param, num_hidden_layers=LAYERS, **overrides)
    torch.manual_seed(1)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    student = AutoModelForCausalLM.from_config(converted_config(config, ["softmax"] * LAYERS, {}))
    student.load_state_dict(teacher.state_dict(), strict=True)
    return teacher, student.eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 300, (2, 37))


@pytest.fixture
def left_padding():
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[0, :11] = 0
    return mask


def assert_same_logits(pair, tokens, rows=slice(None), **inputs):
    teacher, student = pair
    with torch.no_grad():
        expected = teacher(tokens, **inputs).logits[rows]
        actual = student(tokens, **inputs).logits[rows]
    assert expected.abs().max() > 1, "the logits are too small to tell a wrong model from a right"
    assert (actual - expected).abs().max() <= 1e-4


def test_logits(pair, tokens):
    assert_same_logits(pair, tokens)


def test_logits_of_a_left_padded_batch(pair, tokens, left_padding):
    rows = left_padding.bool()
    assert_same_logits(pair, tokens, rows, attention_mask=left_padding)


def test_logits_of_packed_rows(pair, tokens):
    position_ids = torch.cat([torch.arange(n) for n in (10, 17, 10)])[None].expand(2, -1)
    assert_same_logits(pair, tokens, position_ids=position_ids, use_cache=False)


def test_hidden_states_and_tuples(pair, tokens):
    teacher, student = pair
    with torch.no_grad():
        expected = teacher(tokens, output_hidden_states=True).hidden_states
        actual = student(tokens, output_hidden_states=True, return_dict=False)[-1]
    assert len(actual) == len(expected) == LAYERS + 1
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
def test_generate(pair, tokens, left_padding, options):
    """Beyond the window, from a padded batch: greedy, beams, and sampling by the same seed."""
    texts = []
    for model in pair:
        torch.manual_seed(3)
        texts.append(
            model.generate(
                tokens,
                attention_mask=left_padding,
                max_new_tokens=12,
                **{"do_sample": False, **options},
            )
        )
    assert torch.equal(*texts)
