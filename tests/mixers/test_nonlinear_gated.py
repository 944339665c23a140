"""The nonlinear mixer: where it starts, what bounds it, and both of its regimes."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch

from supra.errors import UserError
from supra.mixers import AttentionShape, build_mixer
from supra.mixers.nonlinear_gated import WRITTEN
from supra.mixers.state_policy import StatePolicy
from supra.parallel import METHODS, solve
from supra.testing import mixer_inputs

SHAPE = AttentionShape(4, 2, 6, 5, 12)
UNGATED = {"output_gate": False}  # which is float32 whatever its inputs are


def make(**options):
    mixer = build_mixer("nonlinear_gated", SHAPE, UNGATED | options)
    mixer.reset_parameters()
    return mixer.double()


def in_float32(inputs):
    fields = ("hidden_states", "query", "key", "value")
    return dataclasses.replace(inputs, **{x: getattr(inputs, x).float() for x in fields})


def test_it_starts_as_gated_linear_attention():
    """At a = 0 and small writes its sums are those of its mixing matrix."""
    mixer, inputs = make(), mixer_inputs(SHAPE, 150)
    mixer.log_gain.data.fill_(-12.0)
    output, _ = mixer.mix(inputs)
    value = inputs.value.repeat_interleave(2, dim=2).transpose(1, 2)
    expected = (mixer.mixing_matrix(inputs) @ value).transpose(1, 2)
    assert torch.allclose(output, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("solver", METHODS)
def test_solvers_have_the_state_of_the_kernels_without_memory(solver):
    """As conversion and `supra inspect` size it."""
    inputs = mixer_inputs(SHAPE, 3)
    tensors = {
        name: x.to("meta") for name, x in vars(inputs).items() if isinstance(x, torch.Tensor)
    }
    inputs = dataclasses.replace(inputs, **tensors)
    (expected,) = make().to("meta")(inputs, return_state=True)[1]
    (found,) = make(solver=solver).to("meta")(inputs, return_state=True)[1]
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("solver", ["sequential", "deer", "elk"])
@pytest.mark.parametrize("largest", [0.5, 2.4])
def test_solvers_agree_with_the_kernels_in_both_regimes(solver, largest):
    """Contracting or bistable, a method that does not converge gives way to a loop."""
    mixer = make(largest=largest, solver=solver, sweeps=12)
    generator = torch.Generator().manual_seed(0)
    shape = mixer.recurrence.shape
    mixer.recurrence.data.copy_(20 * torch.rand(shape, generator=generator) - 10)  # a = ± largest
    mixer.log_gain.data.fill_(0.0)
    mixer.decay_gate.set_half_life(torch.ones(4))  # slow gates let Newton's method pass even so
    inputs = mixer_inputs(SHAPE, 140)
    gives_way = largest > 1 and solver != "sequential"
    with (
        pytest.warns(UserWarning, match="a loop over the tokens takes over")
        if gives_way
        else nullcontext()
    ):
        output, end = mixer(inputs, return_state=True)
    loop = build_mixer("nonlinear_gated", SHAPE, UNGATED | {"largest": largest})
    loop.double().load_state_dict(mixer.state_dict())
    expected, state = loop(inputs, return_state=True)
    assert torch.allclose(output, expected, rtol=1e-8, atol=1e-10)
    assert torch.allclose(end.memory, state.memory, rtol=1e-8, atol=1e-10)
    assert end.memory.abs().max() <= 1
    assert end.memory.is_contiguous() and end.memory.untyped_storage().nbytes() == 8 * 2 * 4 * 6 * 5


def test_a_trust_region_that_is_given_is_taken(monkeypatch):
    given = []

    def noted(*args, **options):
        given.append(options["trust_region"])
        return solve(*args, **options)

    monkeypatch.setattr("supra.mixers.nonlinear_gated.solve", noted)
    inputs = mixer_inputs(SHAPE, 9)
    expected = make(solver="elk")(inputs)[0]
    found = make(solver="elk", trust_region=0.25)(inputs)[0]
    assert given == ["auto", 0.25] and torch.allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("solver", ["sequential", "deer"])
def test_solvers_agree_with_the_kernels_under_padding_and_packing(solver):
    mixer = make(solver=solver)
    kernels = build_mixer("nonlinear_gated", SHAPE, UNGATED).double()
    kernels.load_state_dict(mixer.state_dict())
    inputs = mixer_inputs(SHAPE, 140)
    mask = torch.ones(2, 140, dtype=torch.bool)
    mask[0, :31] = False
    padded = dataclasses.replace(inputs, padding_mask=mask)
    bounds = torch.tensor([0, 0, 17, 130, 141, 280], dtype=torch.int32)
    for given in (padded, dataclasses.replace(inputs, cu_seqlens=bounds)):
        output, expected = mixer(given)[0], kernels(given)[0]
        assert torch.allclose(output, expected, rtol=1e-8, atol=1e-10)
    packed = dataclasses.replace(inputs, cu_seqlens=bounds)
    assert mixer(packed, return_state=True)[1] is None


@pytest.mark.parametrize("solver", ["auto", "sequential", "deer"])
def test_autocast_changes_nothing(solver):
    """What is read of a float32 state is not rounded to 16 bits."""
    mixer, inputs = make(solver=solver).float(), in_float32(mixer_inputs(SHAPE, 30))
    expected, _ = mixer.mix(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = mixer.mix(inputs)
    assert torch.equal(found, expected)


def test_calibration_keeps_what_is_written_small():
    """A tanh of a tenth bends by a third of a percent: the start is the linear mixer."""
    mixer, inputs = build_mixer("nonlinear_gated", SHAPE, {}), in_float32(mixer_inputs(SHAPE, 40))
    mixer.reset_parameters()
    target = 0.2 * torch.randn(2, 40, 4, 5, generator=torch.Generator().manual_seed(0))
    target += (
        inputs.value.cumsum(1).repeat_interleave(2, dim=2) / torch.arange(1, 41)[:, None, None]
    )
    before = (mixer(inputs)[0] - target).square().mean()
    mixer.calibrate(inputs, target)
    assert (mixer(inputs)[0] - target).square().mean() < 0.9 * before
    _, key, value, _ = mixer._tensors(inputs)
    size = (key[..., None] * value[..., None, :]).square().mean((0, 1, 3, 4)).sqrt()
    assert (size < 2.5 * WRITTEN).all() and (size > 0.4 * WRITTEN).all()


def test_gradients_reach_every_parameter():
    mixer, inputs = make(), mixer_inputs(SHAPE, 30)
    mixer(inputs)[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"largest": 3}, r"largest \(=3\) must be a finite number > 0 and <= 2.4"),
        ({"largest": "big"}, r"largest \(='big'\) must be a finite number > 0 and <= 2.4"),
        ({"solver": "newton"}, "solver"),
        ({"sweeps": 0}, r"sweeps \(=0\) must be a whole number from 1 to 1024"),
        ({"sweeps": 1025}, r"sweeps \(=1025\) must be a whole number from 1 to 1024"),
        ({"trust_region": 0}, r"trust_region \(=0\) must be a finite number > 0"),
        ({"trust_region": "wide"}, r"trust_region \(='wide'\) must be a finite number"),
        ({"scale": 1}, r"scale \(=1\) must be true or false"),
    ],
)
def test_what_is_no_option(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_policies_do_not_act():
    for policy in (StatePolicy(window=4), StatePolicy(decay_scale=0.9), StatePolicy(norm=1.0)):
        with pytest.raises(UserError, match="its state is no sum, and bounded already; leave"):
            make().set_policy(policy, 0)
