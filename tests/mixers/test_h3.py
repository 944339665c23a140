"""The `h3` mixer is its recurrence, solves without training what it was designed for, and starts
near its teacher."""

import dataclasses
import math
from random import Random

import pytest
import torch
from torch.nn import functional as F

from supra.data.synthetic import AssociativeRecall, Induction
from supra.errors import UserError
from supra.kernels.long_conv import chunk_ssm_conv
from supra.mixers import AttentionShape, build_mixer
from supra.mixers.h3 import KEY_CONTENT, DiagonalModel
from supra.testing import mixer_inputs

SHAPE = AttentionShape(query_heads=6, key_heads=2, head_size=8, value_size=8, hidden_size=48)
NARROW = dataclasses.replace(SHAPE, value_size=7)


def build(shape=SHAPE, seed=None, **options):
    """A mixer in float64, with parameters off their start if there is a seed."""
    mixer = build_mixer("h3", shape, {"d_state": 6, **options}).double()
    mixer.reset_parameters()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for x in mixer.parameters():
            x.data.add_(0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype))
    return mixer


def recurrence(mixer, inputs):
    """Shift register and diagonal SSM token by token, over gates [B, T, H, p]."""
    shape, size = mixer.shape, mixer.options.head_size
    taps = mixer.shift.weight.flip(1).view(shape.key_heads, shape.head_size, -1)
    register = torch.zeros(2, *taps.shape, dtype=torch.float64)
    model = mixer.model
    A = torch.complex(-model.log_A_real.exp(), model.A_imag)
    z = model.log_dt.exp()[:, None] * A / 2
    keep, write = (1 + z) / (1 - z), model.log_dt.exp()[:, None] / (1 - z)
    blocks = 1 if size == shape.head_size else shape.value_size // size
    state, outputs = 0, []
    for t in range(inputs.query.shape[1]):
        register = torch.cat([inputs.key[:, t, ..., None], register[..., :-1]], dim=-1)
        key = (taps * register).sum(-1) + mixer.shift.bias.view(shape.key_heads, -1)
        query = mixer.query_weight * inputs.query[:, t] + mixer.query_bias
        key, value = (x.repeat_interleave(3, dim=1) for x in (key, inputs.value[:, t]))
        value = value.unflatten(-1, (blocks, -1)).flatten(1, 2)
        gates = [x.unflatten(-1, (-1, size)) for x in (query, key)]
        of = torch.arange(blocks) * gates[0].shape[2] // blocks
        query, key = (x[:, :, of].flatten(1, 2) for x in gates)
        new = key[..., None] * value[..., None, :]  # [B, H, p, V]
        state = keep[..., None, None] * state + write[..., None, None] * new[:, :, None]
        C = torch.view_as_complex(model.C.contiguous())[..., None, None]
        held = 2 * (C * state).real.sum(2) + model.D[:, None, None] * new
        outputs.append((query[..., None] * held).sum(2).view(2, shape.query_heads, -1))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("init", ["teacher", "published"])
@pytest.mark.parametrize(
    ("shape", "size"), [(SHAPE, 1), (SHAPE, 4), (SHAPE, 8), (NARROW, 1), (NARROW, 8)]
)
@torch.no_grad()
def test_is_its_recurrence(shape, size, init):
    """As a convolution in one pass, with a prefill into a state, and in steps."""
    mixer = build(shape, seed=0, head_size=size, shift_size=9, init=init)
    inputs = mixer_inputs(shape, 75, seed=1)
    expected = recurrence(mixer, inputs)
    assert expected.std() > 0.1
    found, end = mixer.mix(inputs, return_state=True)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    found, state = mixer.mix(inputs.first(70), return_state=True)
    names = ("hidden_states", "query", "key", "value")
    for t in range(70, 75):
        token = {n: getattr(inputs, n)[:, t : t + 1] for n in names}
        output, state = mixer.mix(dataclasses.replace(inputs, **token), state, return_state=True)
        torch.testing.assert_close(output, expected[:, t : t + 1], atol=1e-10, rtol=1e-10)
    for ours, theirs in zip(state, end, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def one_hot_h3(vocabulary, shifted):
    """Queries, keys and values are the words; the shift a delay of one token, and nothing fades."""
    shape = AttentionShape(1, 1, vocabulary, vocabulary, vocabulary)
    mixer = build_mixer("h3", shape, {
        "head_size": vocabulary, "d_state": 2, "shift_size": 2, "output_gate": False,
    }).double()  # fmt: skip
    mixer.reset_parameters()
    mixer.query_weight.data.fill_(1)
    mixer.query_bias.data.zero_()
    mixer.shift.weight.data.copy_(torch.tensor([1.0, 0.0] if shifted else [0.0, 1.0]))
    mixer.shift.bias.data.zero_()
    mixer.model.log_A_real.data.fill_(-40)
    mixer.model.log_dt.data.zero_()
    mixer.model.C.data.copy_(torch.tensor([0.5, 0.0]))
    return mixer


@pytest.mark.parametrize(
    ("language", "random"),
    [
        (Induction(), 1 / 18),
        (AssociativeRecall(), 1 / 4),
        (AssociativeRecall(length=40, vocabulary=20), 1 / 9),
    ],
)
@torch.no_grad()
def test_solves_by_construction_what_it_was_designed_for(language, random):
    """Without training: all with the shift, and without it what a guess among the answers gets."""
    generator = Random(0)
    examples = [language.example(range(language.vocabulary), generator) for _ in range(500)]
    ids = torch.tensor([x.ids for x in examples])
    words = F.one_hot(ids[:, :-1], language.vocabulary).double()[:, :, None]
    candidates = torch.tensor([x.values for x in examples])
    for shifted in (True, False):
        mixer = one_hot_h3(language.vocabulary, shifted)
        inputs = dataclasses.replace(
            mixer_inputs(mixer.shape, 1), hidden_states=words[:, :, 0],
            query=words, key=words, value=words,
        )  # fmt: skip
        scores = mixer(inputs)[0][:, -1, 0].gather(1, candidates)
        found = candidates.gather(1, scores.argmax(1, keepdim=True))[:, 0]
        share = (found == ids[:, -1]).double().mean().item()
        if shifted:
            assert share == 1
        else:
            assert share == pytest.approx(random, abs=4 * math.sqrt(random * (1 - random) / 500))


def test_published_start():
    model, shape = build(init="published", d_state=64).model, SHAPE
    assert model.C.shape == (shape.query_heads * 8, 32, 2)
    torch.testing.assert_close(model.log_A_real.exp(), torch.full_like(model.log_A_real, 0.5))
    torch.testing.assert_close(model.A_imag[0], math.pi * torch.arange(32).double())
    steps = model.log_dt.exp()
    assert 1e-3 <= steps.min() < 4e-3 and 0.025 < steps.max() <= 0.1
    assert 0.9 < model.C.square().sum(-1).mean() < 1.1
    assert 0.5 < model.D.std() < 1.5


def test_discretisation_is_bilinear():
    model = DiagonalModel(3, 5).double()
    model.reset_parameters()
    model.reset_as_published()
    A = torch.complex(-model.log_A_real.exp(), model.A_imag)
    dt = model.log_dt.exp()[:, None]
    C = torch.view_as_complex(model.C.contiguous())
    keep, write = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    taps = 2 * (C * write)[:, None] * keep[:, None] ** torch.arange(50)[:, None]
    expected = taps.real.sum(-1)
    expected[:, 0] += model.D
    found = model()
    impulse = torch.zeros(1, 50, 3, 1, dtype=torch.float64)
    impulse[:, 0] = 1
    output, _ = chunk_ssm_conv(None, None, impulse, **found)
    torch.testing.assert_close(output[0, ..., 0].mT, expected, atol=1e-10, rtol=1e-10)


def test_discretisation_keeps_slow_modes_in_float32():
    """A half-life of a million tokens, where 1 − |Ā| is below what float32 holds of |Ā|."""
    model = DiagonalModel(1, 1)
    model.reset_parameters()
    model.set_half_life(torch.tensor([1e6]))
    expected = torch.tensor([[-math.log(2) / 1e6]])
    torch.testing.assert_close(model()["log_decay"], expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_values_pass_as_averages_at_the_start(size):
    """Where query and key say nothing, what does not change over time stays what it is."""
    mixer, inputs = build(head_size=size), mixer_inputs(SHAPE, 300, seed=3)
    mixer._set_half_life(torch.tensor([2.0, 4, 8, 16, 24, 32]))
    still = inputs.value[:, :1].expand(-1, 300, -1, -1)
    nothing = {"query": 0 * inputs.query, "key": 0 * inputs.key}
    output = mixer(dataclasses.replace(inputs, **nothing, value=still))[0]
    expected = still.repeat_interleave(3, dim=2)
    torch.testing.assert_close(output[:, -1], expected[:, -1], atol=0.01, rtol=0.01)


@pytest.mark.parametrize(("shape", "size"), [(SHAPE, 1), (SHAPE, 4), (NARROW, 1), (NARROW, 8)])
def test_mixing_matrix_is_the_mean_over_the_channels_of_a_head(shape, size):
    """Of a value that is alike in all channels, their mean is what the matrix makes of it."""
    mixer, inputs = build(shape, seed=7, head_size=size), mixer_inputs(shape, 33, seed=8)
    width = shape.value_size
    inputs = dataclasses.replace(inputs, value=inputs.value[..., :1].expand(-1, -1, -1, width))
    value = inputs.value[..., 0].repeat_interleave(3, dim=2)
    mixed = torch.einsum("bhij,bjh->bih", mixer.mixing_matrix(inputs), value)
    torch.testing.assert_close(mixer.mix(inputs)[0].mean(-1), mixed, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("size", [1, 8])
def test_calibration_finds_what_made_the_target(size):
    options = {"head_size": size, "output_gate": False}
    maker, inputs = build(**options), mixer_inputs(SHAPE, 200, seed=1)
    query, key = (x.square().mean((0, 1, 3)).rsqrt() for x in (inputs.query, inputs.key))
    maker._set_gates(torch.tensor([0, 0.25, 0.5, 1, 1, 0.5]) * query, KEY_CONTENT * key)
    maker._set_half_life(torch.tensor([4.0, 16, 16, 64, 4, 256]))
    maker._set_skip(torch.tensor([0, 0.1, -0.3, 1, 0, 0.3]))
    target = 3 * maker(inputs)[0].detach()
    mixer = build(**options)
    before = (mixer(inputs)[0] - target).square().sum()
    mixer.calibrate(inputs, target)
    after = (mixer(inputs)[0] - target).square().sum()
    assert after < 0.05 * before
    assert mixer.query_weight.std(1).max() < 1e-12, "a factor a head"


def test_calibration_scales_the_published_start():
    mixer, inputs = build(init="published"), mixer_inputs(SHAPE, 60, seed=1)
    target = 0.01 * mixer(inputs)[0].detach()
    mixer.calibrate(inputs, target)
    torch.testing.assert_close(mixer(inputs)[0], target, atol=1e-6, rtol=1e-6)


def test_sizes_that_do_not_fit_are_refused():
    for options, match in (
        ({"head_size": 3}, r"head_size \(=3\) must divide the attention's heads, of size 8"),
        ({"head_size": 0}, r"head_size \(=0\) must be a whole number from 1 to 2147483647"),
        ({"d_state": 7}, r"d_state \(=7\) must be even"),
        ({"d_state": 4098}, r"d_state \(=4098\) must be a whole number from 1 to 4096"),
        ({"shift_size": 65}, r"shift_size \(=65\) must be a whole number from 1 to 64"),
        ({"init": "random"}, "init 'random'"),
        ({"scale": 1}, r"scale \(=1\) must be true or false"),
    ):
        with pytest.raises(UserError, match=match):
            build_mixer("h3", SHAPE, options)
    with pytest.raises(UserError, match=r"head_size \(=4\) must divide .* 8 .* and 7 \(value\)"):
        build_mixer("h3", NARROW, {"head_size": 4})
