"""The `softmax` mixer is causal softmax attention, and keeps no more than its window."""

import dataclasses

import pytest
import torch

from supra.mixers import AttentionShape, build_mixer
from supra.testing import mixer_inputs

SHAPE = AttentionShape(query_heads=6, key_heads=2, head_size=8, value_size=5, hidden_size=48)


def make_inputs(tokens, window):
    return mixer_inputs(SHAPE, tokens, scaling=0.7, sliding_window=window)


def formula(inputs):
    """softmax(q·k · scaling) over j ≤ i and j > i − window, with the groups repeated."""
    key, value = (x.repeat_interleave(3, dim=2) for x in (inputs.key, inputs.value))
    scores = torch.einsum("bihk,bjhk->bhij", inputs.query, key) * inputs.scaling
    at = torch.arange(scores.shape[-1])
    distance = at[:, None] - at[None, :]
    seen = (distance >= 0) & (distance < (inputs.sliding_window or len(at)))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhv->bihv", weights, value)


@pytest.mark.parametrize("window", [None, 1, 4, 17])
def test_is_the_formula(window):
    inputs = make_inputs(17, window)
    torch.testing.assert_close(build_mixer("softmax", SHAPE, {})(inputs)[0], formula(inputs))


def test_the_state_is_no_longer_than_the_window():
    mixer, state, lengths = build_mixer("softmax", SHAPE, {}), None, []
    inputs = make_inputs(9, 4)
    outputs = []
    for token in range(9):
        one = {k: getattr(inputs, k)[:, token : token + 1] for k in ("query", "key", "value")}
        output, state = mixer(dataclasses.replace(inputs, **one), state, return_state=True)
        outputs.append(output)
        lengths.append([x.shape[1] for x in state])
    assert lengths == [[min(token + 1, 3)] * 3 for token in range(9)]
    torch.testing.assert_close(torch.cat(outputs, dim=1), formula(inputs))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": 4},
        {"softcap": 1.5},
        {"sinks": torch.linspace(-1, 2, 6)},
        {"padding_mask": torch.arange(17).expand(2, 17) >= torch.tensor([[0], [5]])},
        {"cu_seqlens": torch.tensor([0, 3, 20, 34])},
    ],
)
def test_mixing_matrix_is_what_multiplies_the_values(fields):
    inputs = dataclasses.replace(make_inputs(17, None), **fields)
    mixer = build_mixer("softmax", SHAPE, {})
    value = inputs.value.repeat_interleave(3, dim=2)
    mixed = torch.einsum("bhij,bjhv->bihv", mixer.mixing_matrix(inputs), value)
    torch.testing.assert_close(mixed, mixer(inputs)[0])
