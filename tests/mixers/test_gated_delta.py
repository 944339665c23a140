"""The `gated_delta` mixer is the rule with a decay and a strength from the hidden states."""

import pytest
import torch
import torch.nn.functional as F

from supra.mixers import AttentionShape, build_mixer
from supra.mixers.feature_maps import choose_sharpness
from supra.testing import mixer_inputs

SHAPE = AttentionShape(query_heads=6, key_heads=2, head_size=8, value_size=7, hidden_size=48)


@pytest.mark.parametrize("feature_map", ["hedgehog", "identity", "sign_pair"])
def test_is_its_equation(feature_map):
    mixer = build_mixer("gated_delta", SHAPE, {"feature_map": feature_map}).double()
    mixer.reset_parameters()
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    inputs = mixer_inputs(SHAPE, 35, seed=1)
    query, key = (F.normalize(x, dim=-1) for x in mixer.feature_map(inputs.query, inputs.key))
    decay = mixer.decay_gate(inputs.hidden_states).exp()
    strength = mixer.strength(inputs.hidden_states).sigmoid()
    state, outputs = torch.zeros(2, 6, query.shape[-1], 7, dtype=torch.float64), []
    for t in range(35):
        k, v = (x[:, t].repeat_interleave(3, dim=1) for x in (key, inputs.value))
        state = decay[:, t, :, None, None] * state
        held = torch.einsum("bhk,bhkv->bhv", k, state)
        update = strength[:, t, :, None] * (v - held)
        state = state + torch.einsum("bhk,bhv->bhkv", k, update)
        outputs.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    gate = (
        2 * (inputs.hidden_states @ mixer.output_gate.weight.T + mixer.output_gate.bias).sigmoid()
    )
    expected = torch.stack(outputs, 1) * mixer.scale * mixer.magnitude
    expected = expected * gate.unflatten(-1, (6, 7))
    torch.testing.assert_close(mixer(inputs)[0], expected, atol=1e-6, rtol=1e-6)


def test_calibration_finds_the_strength_and_the_half_life_that_made_the_target():
    torch.manual_seed(0)
    mixer = build_mixer("gated_delta", SHAPE, {"feature_map": "sign_pair"}).double()
    mixer.reset_parameters()
    inputs = mixer_inputs(SHAPE, 200, seed=1)
    mixer.decay_gate.set_half_life(torch.full((6,), 64.0))
    mixer.strength.set(torch.full((6,), 0.25).logit())
    target = 3 * mixer(inputs)[0]
    mixer.reset_parameters()
    mixer.calibrate(inputs, target)
    torch.testing.assert_close(mixer.strength.bias.sigmoid(), torch.full((6,), 0.25).double())
    torch.testing.assert_close(mixer(inputs)[0], target, atol=1e-5, rtol=1e-4)


def test_calibration_finds_the_sharpness_that_made_the_target():
    torch.manual_seed(0)
    mixer = build_mixer("gated_delta", SHAPE, {}).double()
    mixer.reset_parameters()
    inputs = mixer_inputs(SHAPE, 200, seed=1)
    features, made = mixer.feature_map, torch.tensor([0.05, 0.1, 0.25, 0.5, 1.0, 0.25]).double()
    features.sharpen(features.key_weight, torch.full((2,), 0.5).double())
    features.sharpen(features.query_weight, made)
    target = 3 * mixer(inputs)[0]
    features.reset_parameters()
    choose_sharpness(mixer, inputs, target, 0.5)
    found = features.query_weight.norm(dim=-1)
    torch.testing.assert_close(found, made[:, None].expand_as(found))
    torch.testing.assert_close(mixer(inputs)[0], target, atol=1e-5, rtol=1e-4)
