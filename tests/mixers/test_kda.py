"""The `kda` mixer is Kimi Delta Attention on the teacher's heads, and starts near its teacher."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from supra.errors import UserError
from supra.mixers import AttentionShape, build_mixer
from supra.mixers.kda import LowRank
from supra.testing import mixer_inputs

GROUPED = AttentionShape(6, 2, head_size=8, value_size=8, hidden_size=48, norm_eps=3e-3)
ODD = AttentionShape(3, 3, head_size=10, value_size=7, hidden_size=30, norm_eps=3e-3)
CASES = [(GROUPED, {}), (ODD, {"beta_range": 2.0}), (ODD, {"sign_pairs": False, "conv_size": 3})]


def build(shape=GROUPED, options=None, seed=None):
    """A mixer in float64, with parameters off their start if there is a seed."""
    mixer = build_mixer("kda", shape, options or {}).double()
    mixer.reset_parameters()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for x in mixer.parameters():
            x.data.add_(0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype))
        mixer.conv.gain.uniform_(0.5, 2.0, generator=generator)
    return mixer


def features(mixer, inputs):
    """Query, key and value after their convolutions, [B, T, Hq, channels] each."""
    shape, constant = mixer.shape, inputs.hidden_states @ mixer.constant.weight[0]
    taps = mixer.conv.weight * mixer.conv.gain[:, None]
    for name, bias in (
        ("query", mixer.query_bias), ("key", mixer.key_bias), ("value", mixer.value_bias)
    ):  # fmt: skip
        x = getattr(inputs, name)
        x = x.repeat_interleave(shape.query_heads // x.shape[2], dim=2)
        x = torch.cat([sign * x for sign in mixer.signs], dim=-1)
        x = (x + constant[..., None, None] * bias).flatten(2)
        own, taps = taps[: x.shape[2]], taps[x.shape[2] :]
        x = F.pad(x.mT, (own.shape[1] - 1, 0))
        yield F.silu(F.conv1d(x, own[:, None], groups=len(own))).mT.unflatten(2, bias.shape)


@pytest.mark.parametrize(("shape", "options"), CASES, ids=["grouped", "odd", "odd without pairs"])
@torch.no_grad()
def test_is_its_equation(shape, options):
    mixer, inputs = build(shape, options, seed=0), mixer_inputs(shape, 35, seed=1)
    u, decay, gate = inputs.hidden_states, mixer.decay, mixer.output_gate
    query, key, value = features(mixer, inputs)
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    step = (u @ decay.dt.down.T @ decay.dt.up.T).view(key.shape) + decay.dt.bias
    decays = (-decay.A_log.exp()[:, None] * F.softplus(step)).exp()
    strength = options.get("beta_range", 1.0) * (u @ mixer.strength.weight.T).sigmoid()
    state, sums = key.new_zeros(*key[:, 0].shape, value.shape[-1]), []
    for t in range(35):
        state = decays[:, t, ..., None] * state
        missing = value[:, t] - torch.einsum("bhk,bhkv->bhv", key[:, t], state)
        written = strength[:, t, :, None] * missing
        state = state + key[:, t, ..., None] * written[:, :, None]
        sums.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state) / key.shape[-1] ** 0.5)
    sums = torch.stack(sums, 1)
    found, end = mixer(inputs, return_state=True)
    torch.testing.assert_close(end.memory, state, atol=1e-12, rtol=1e-12)
    gates = 2 * ((u @ gate.down.T @ gate.up.T).view(sums.shape) + gate.bias).sigmoid()
    expected = sums / (sums.square().mean(-1, keepdim=True) + shape.norm_eps).sqrt()
    expected = mixer.in_blocks(expected * mixer.scale * mixer.magnitude * gates).sum(-2)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_every_channel_has_the_half_life_that_it_is_given():
    mixer, inputs = build(), mixer_inputs(GROUPED, 5)
    tokens = 4 ** (6 * torch.rand(6, 16, generator=torch.Generator().manual_seed(0)).double())
    mixer.decay.set_half_lives(tokens)
    expected = (-math.log(2) / tokens).expand(2, 5, -1, -1)
    torch.testing.assert_close(mixer._log_decay(inputs.hidden_states), expected)


@pytest.mark.parametrize("heads", [5, 16])
def test_a_product_of_low_rank_holds_a_row_per_head(heads):
    """With more heads than its rank of 7, the nearest that it can hold."""
    shape = dataclasses.replace(ODD, query_heads=heads, key_heads=heads)
    product = LowRank(shape, channels=4)
    product.reset_parameters()
    rows = torch.randn(heads, 30, generator=torch.Generator().manual_seed(0))
    product.set_weight(rows)
    left, size, right = torch.linalg.svd(rows, full_matrices=False)
    size[7:] = 0
    expected = (left * size) @ right
    found = (product.up @ product.down).unflatten(0, (heads, 4))
    torch.testing.assert_close(found, expected[:, None].expand_as(found), atol=1e-5, rtol=1e-5)


def test_calibration_finds_what_made_the_target():
    """Half-lives and strengths per head, taps of values, and a scale."""
    maker, mixer, inputs = build(), build(), mixer_inputs(GROUPED, 200, seed=1)
    inputs = dataclasses.replace(inputs, hidden_states=inputs.hidden_states + 4)
    maker.calibrate(inputs, maker(inputs)[0])
    maker._set_half_life(torch.tensor([4.0, 16, 64, 256, 16, 64]))
    maker._set_strength(torch.tensor([0.03, 0.06, 0.12, 0.25, 0.5, 0.5]))
    value = maker._parts(maker.conv.weight.data)[2]
    taps = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(2)).repeat(1, 2, 1)
    value.copy_(taps / taps.norm(dim=-1, keepdim=True))
    target = 3 * maker(inputs)[0].detach()
    before = (mixer(inputs)[0] - target).square().sum()
    mixer.calibrate(inputs, target)
    after = (mixer(inputs)[0] - target).square().sum()
    assert after < 0.05 * before
    assert after < 0.1 * target.square().sum()


@torch.no_grad()
def test_calibration_finds_which_channels_remember_longer():
    maker, mixer, inputs = build(), build(), mixer_inputs(GROUPED, 200, seed=1)
    maker._set_half_life(torch.full((6,), 16.0))
    longer = torch.randint(2, (6, 16), generator=torch.Generator().manual_seed(2)) * 2 - 1
    maker.decay.set_half_lives(maker.decay.half_lives() * 2.7**longer)
    mixer._choose_decay(inputs, maker(inputs)[0])
    torch.testing.assert_close(mixer.decay.half_lives(), maker.decay.half_lives())


def test_wrong_options_are_refused():
    for options, match in (
        ({"conv_size": 0}, r"conv_size \(=0\) must be a whole number from 1 to 64"),
        ({"beta_range": 2.5}, r"beta_range \(=2.5\)"),
        ({"sign_pairs": 1}, r"sign_pairs \(=1\) must be true or false"),
    ):
        with pytest.raises(UserError, match=match):
            build_mixer("kda", GROUPED, options)
