"""The `rwkv` mixer is RWKV-6's recurrence on the teacher's heads, and starts near its teacher."""

import dataclasses

import pytest
import torch

from supra.errors import UserError
from supra.mixers import AttentionShape, build_mixer
from supra.mixers.rwkv import fill_heads
from supra.testing import mixer_inputs

SHAPE = AttentionShape(query_heads=6, key_heads=2, head_size=8, value_size=7, hidden_size=48)


def build(options=None, seed=None):
    """A mixer in float64, with parameters off their start if there is a seed."""
    mixer = build_mixer("rwkv", SHAPE, options or {}).double()
    mixer.reset_parameters()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for x in mixer.parameters():
            x.data.add_(0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype))
    return mixer


def moved(x, share):
    """Towards the token before, zeros before the first, by a share per channel."""
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    return x + share.view(x.shape[2:]) * (before - x)


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("balance_state", [False, True])
def test_is_its_equation(token_shift, balance_state):
    mixer = build({"token_shift": token_shift, "balance_state": balance_state, "rank": 5}, seed=0)
    inputs = mixer_inputs(SHAPE, 35, seed=1)
    value, key, query, x = inputs.value, inputs.key, inputs.query, inputs.hidden_states
    if token_shift:
        shares = mixer.shift.split([2 * 7, 2 * 8, 6 * 8, 48])
        pairs = zip((value, key, query, x), shares, strict=True)
        value, key, query, x = (moved(*pair) for pair in pairs)
    query, key = query + mixer.query_bias, key + mixer.key_bias
    key, value = (y.repeat_interleave(3, dim=2) for y in (key, value))
    delta = (x @ mixer.decay.A).tanh() @ mixer.decay.B
    decay = (-(mixer.decay.w0 + delta.unflatten(-1, (6, 8))).exp()).exp()
    if balance_state:
        key = key * (1 - decay)
    state, outputs = torch.zeros(2, 6, 8, 7, dtype=torch.float64), []
    for t in range(35):
        new = key[:, t, :, :, None] * value[:, t, :, None]
        read = state + mixer.bonus[..., None] * new
        outputs.append(inputs.scaling * torch.einsum("bhk,bhkv->bhv", query[:, t], read))
        state = decay[:, t, ..., None] * state + new
    expected = torch.stack(outputs, 1)
    found, end = mixer.mix(inputs, return_state=True)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(end.memory, state, atol=1e-12, rtol=1e-12)
    gate = inputs.hidden_states @ mixer.output_gate.weight.T + mixer.output_gate.bias
    expected = expected * mixer.scale * 2 * gate.sigmoid().unflatten(-1, (6, 7))
    torch.testing.assert_close(mixer(inputs)[0], expected, atol=1e-6, rtol=1e-6)


def test_the_form_of_qrwkv_is_its_equation():
    """The state is read after its decay, without a bonus, and the gate has no bias."""
    mixer, inputs = build({"form": "qrwkv", "rank": 5}, seed=0), mixer_inputs(SHAPE, 35, seed=1)
    x, query, key = inputs.hidden_states, inputs.query + mixer.query_bias, inputs.key
    key, value = (y.repeat_interleave(3, dim=2) for y in (key + mixer.key_bias, inputs.value))
    delta = (x @ mixer.decay.A).tanh() @ mixer.decay.B
    decay = (-(mixer.decay.w0 + delta.unflatten(-1, (6, 8))).exp()).exp()
    state, outputs = torch.zeros(2, 6, 8, 7, dtype=torch.float64), []
    for t in range(35):
        written = (key * (1 - decay))[:, t, :, :, None] * value[:, t, :, None]
        state = decay[:, t, ..., None] * state + written
        outputs.append(8**-0.5 * torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    gate = 2 * (x @ mixer.output_gate.weight.T).sigmoid().unflatten(-1, (6, 7))
    expected = torch.stack(outputs, 1) * mixer.scale * gate
    output, end = mixer(inputs, return_state=True)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(end.memory, state, atol=1e-12, rtol=1e-12)
    names = {name for name, _ in mixer.named_parameters()}
    assert names == {
        "scale", "query_bias", "key_bias", "decay.w0", "decay.A", "decay.B", "output_gate.weight"
    }  # fmt: skip


def quadratic(inputs, half_lives, bonus):
    """scaling · Σ (1 − w) w^(i−1−j) (qᵢ·kⱼ) vⱼ, the token itself with the weight (1 − w) u."""
    decay = torch.exp2(-1 / half_lives.double())[:, None, None]
    distance = torch.arange(inputs.query.shape[1]).double()
    distance = distance[:, None] - distance
    weights = (1 - decay) * decay ** (distance - 1).clamp(min=0)
    own = (1 - decay) * bonus.double()[:, None, None] * torch.eye(len(distance))
    weights = torch.where(distance > 0, weights, own)
    key, value = (x.repeat_interleave(3, dim=2) for x in (inputs.key, inputs.value))
    scores = inputs.scaling * torch.einsum("bihk,bjhk->bhij", inputs.query, key)
    return torch.einsum("bhij,bjhv->bihv", scores * weights, value)


def test_starts_as_linear_attention_with_the_teachers_weights():
    """Up to the small part of the decay that depends on the token."""
    mixer, inputs = build(), mixer_inputs(SHAPE, 45, seed=2)
    expected = quadratic(inputs, 4 * 512 ** (torch.arange(6) / 5), torch.ones(6))
    error = (mixer(inputs)[0] - expected).square().mean() / expected.square().mean()
    assert error.sqrt() < 0.01
    mixer.decay.B.data.zero_()
    torch.testing.assert_close(mixer(inputs)[0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("form", ["supra", "qrwkv"])
def test_calibration_finds_what_made_the_target(form):
    """Half-lives, biases of r and bonuses per head, and a scale."""
    maker, mixer, inputs = (
        build({"form": form}),
        build({"form": form}),
        mixer_inputs(SHAPE, 200, seed=1),
    )
    query, key = inputs.magnitudes()
    maker.decay.set_half_life(torch.tensor([1.0, 4, 16, 64, 256, 16]))
    if form == "supra":
        fill_heads(maker.bonus, torch.tensor([1.0, 0, 2, 1, 4, 0.5]))
    fill_heads(maker.query_bias, torch.tensor([0, 0.25, 0.5, 1, 2, 0]) * query)
    fill_heads(maker.key_bias, (0.25 if form == "qrwkv" else 0.5) * key)
    target = 3 * maker(inputs)[0].detach()
    before = (mixer(inputs)[0] - target).square().sum()
    mixer.calibrate(inputs, target)
    after = (mixer(inputs)[0] - target).square().sum()
    assert after < 0.05 * before
    power = mixer.scale.square().mean(1)
    torch.testing.assert_close(power, torch.ones_like(power))


def test_every_channel_and_token_has_a_decay_of_its_own():
    mixer, inputs = build(seed=4), mixer_inputs(SHAPE, 20, seed=5)
    log_decay = mixer.decay(inputs.hidden_states)
    assert log_decay.shape == (2, 20, 6, 8)
    assert (log_decay < 0).all()
    assert log_decay.neg().log().std(1).min() > 0.1
    assert log_decay.neg().log().std(-1).min() > 0.1


def test_group_norm_comes_before_the_scale_and_the_gate():
    mixer, inputs = build({"normalize": "group"}, seed=6), mixer_inputs(SHAPE, 20, seed=7)
    mixed = mixer.mix(inputs)[0]
    mean, variance = mixed.mean(-1, keepdim=True), mixed.var(-1, keepdim=True, unbiased=False)
    gate = mixer.output_gate(inputs.hidden_states)
    expected = (mixed - mean) / (variance + 1e-5).sqrt() * mixer.scale * mixer.magnitude * gate
    torch.testing.assert_close(mixer(inputs)[0], expected, atol=1e-9, rtol=1e-9)


def test_the_state_is_the_memory_alone_without_token_shift():
    inputs = mixer_inputs(SHAPE, 9)
    _, state = build()(inputs, return_state=True)
    assert state.memory.shape == (2, 6, 8, 7)
    assert state.conv_state is None
    _, state = build({"token_shift": True})(inputs, return_state=True)
    last = [getattr(inputs, n)[:, -1:].flatten(2) for n in ("value", "key", "query")]
    assert torch.equal(state.conv_state, torch.cat([*last, inputs.hidden_states[:, -1:]], dim=-1))


@pytest.mark.parametrize("token_shift", [False, True])
def test_mixing_matrix_is_the_mean_over_the_channels_of_a_head(token_shift):
    """Of a value that is alike in all channels, their mean is what the matrix makes of it."""
    mixer, inputs = build({"token_shift": token_shift}, seed=7), mixer_inputs(SHAPE, 33, seed=8)
    inputs = dataclasses.replace(inputs, value=inputs.value[..., :1].expand(-1, -1, -1, 7))
    value = inputs.value[..., 0].repeat_interleave(3, dim=2)
    mixed = torch.einsum("bhij,bjh->bih", mixer.mixing_matrix(inputs), value)
    torch.testing.assert_close(mixer.mix(inputs)[0].mean(-1), mixed, atol=1e-12, rtol=1e-12)


def test_what_no_rwkv_has_is_refused():
    for options, match in (
        ({"rank": 0}, r"rank \(=0\) must be a whole number from 1 to 4096"),
        ({"rank": 4097}, r"rank \(=4097\) must be a whole number from 1 to 4096"),
        ({"normalize": "rms"}, "normalize 'rms'"),
        ({"form": "qrwkv", "token_shift": True}, r"token_shift \(=True\) must be False in the f"),
        ({"token_shift": 1}, r"token_shift \(=1\) must be true or false"),
    ):
        with pytest.raises(UserError, match=match):
            build_mixer("rwkv", SHAPE, options)
