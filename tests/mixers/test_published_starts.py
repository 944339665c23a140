"""The starts of mixers in models that are trained from scratch, beside the published ones."""

import math

import pytest
import torch
from torch.nn import functional as F

from supra.mixers import MIXERS, AttentionShape, build_mixer

SHAPE = AttentionShape(
    query_heads=33, key_heads=33, head_size=16, value_size=16, hidden_size=63, norm_eps=1e-5
)
STARTS = [name for name, kind in MIXERS.items() if "init" in kind.from_scratch]
GATED = ("mamba2", "gated_deltanet", "kda")  # layers with a step and a slope of the decay


def started(name, seed=0, **options):
    torch.manual_seed(seed)
    mixer = build_mixer(name, SHAPE, MIXERS[name].from_scratch | options)
    mixer.reset_parameters()
    return mixer


def test_these_mixers_have_published_starts():
    assert STARTS == ["gated_deltanet", "kda", "mamba2", "h3"]


@pytest.mark.parametrize("name", STARTS)
def test_starts_are_random_finite_and_from_the_seed(name):
    first, again, other = (dict(started(name, seed).named_parameters()) for seed in (0, 0, 1))
    assert all(x.isfinite().all() for x in first.values())
    assert all(torch.equal(x, again[key]) for key, x in first.items())
    assert not all(torch.equal(x, other[key]) for key, x in first.items())


@pytest.mark.parametrize("name", GATED)
def test_steps_and_slopes_have_the_published_ranges(name):
    """Mamba-2: A from −16 to −1, Δ from 1e-3 to 0.1, evenly by its logarithm."""
    mixer = started(name)
    decay = mixer.decay if name == "kda" else mixer
    slope, step = decay.A_log.exp(), F.softplus(decay.dt.bias).double()
    assert (0 if name == "gated_deltanet" else 1) <= slope.min() < 4
    assert 13 < slope.max() <= 16
    assert step.min() > 0.999e-3 and step.max() < 0.1001
    middle = math.log(1e-2)
    assert abs(step.log().mean() - middle) < 0.6, "as many steps below 0.01 as above"


@pytest.mark.parametrize("name", GATED)
def test_layers_start_as_those_of_torch(name):
    """Convolutions within 1/√4 and projections within 1/√D, both uniform."""
    mixer = started(name)
    gate = mixer.output_gate.down if name == "kda" else mixer.output_gate.weight
    dt = mixer.decay.dt.down if name == "kda" else mixer.dt.weight
    for weight, bound in ((mixer.conv.weight, 0.5), (gate, 63**-0.5), (dt, 63**-0.5)):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
    if name == "mamba2":
        assert torch.equal(mixer.D, torch.ones(33))


def test_a_start_of_conversion_stays_what_it_was():
    """Without the option, convolutions are deltas."""
    for name in GATED:
        mixer = started(name, init="teacher")
        taps = torch.tensor([0.0, 0.0, 0.0, 1.0])
        assert torch.equal(mixer.conv.weight, taps.expand_as(mixer.conv.weight))
