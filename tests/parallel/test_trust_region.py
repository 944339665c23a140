"""ELK's trust region: how it adapts, and what it is worth on cells that Newton's method fails."""

import pytest
import torch

from supra.bench.parallel import expanding, gated
from supra.parallel import NonlinearGated, solve
from supra.parallel.scan import Structure
from supra.parallel.trust_region import FACTOR, LARGEST, SMALLEST, START, TrustRegion


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def two_resting_points(tokens):
    """Channels that forget slowly and count; Newton's method overflows on them."""
    key = torch.nn.functional.normalize(normal(1, tokens, 1, 7), dim=-1)
    decay = torch.nn.functional.logsigmoid(normal(1, tokens, 1, seed=2))
    return gated(2.4, 7).double(), (key, normal(1, tokens, 1, 7, seed=1), decay)


def expands_in_places(tokens):
    return expanding(1.5, 7), normal(1, tokens, 7)


@pytest.mark.parametrize("problem", [two_resting_points, expands_in_places])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_takes_few_more_sweeps_than_the_best_number(problem, dtype):
    cell, inputs = problem(130)
    expected = solve(cell, inputs, None, "sequential").states
    cell = cell.to(dtype)
    given = inputs.to(dtype) if isinstance(inputs, torch.Tensor) else [x.to(dtype) for x in inputs]
    found = solve(cell, given, None, "elk", otherwise="raise")
    assert found.resets == 0 and (found.states - expected).abs().max() < (
        1e-9 if dtype == torch.float64 else 1e-3
    )
    fixed = [
        solve(cell, given, None, "elk", trust_region=x, otherwise="raise").iterations
        for x in (1e-6, 1e-4, 1e-2)
    ]
    assert found.iterations <= 1.5 * min(fixed)


@pytest.mark.parametrize(
    ("method", "estimate"),
    [("elk", "filter"), ("elk", "smoother"), ("quasi_elk", "filter"), ("deer", "filter")],
)
def test_rows_do_not_change_each_other(method, estimate):
    """An easy row that shares a batch with a hard one has the states that it has alone."""
    weight = torch.full((1, 3, 4), 2.2, dtype=torch.float64)
    weight[:, :, 0] = 0.3
    cell = NonlinearGated(weight)
    key, value, decay = normal(2, 61, 1, 3), normal(2, 61, 1, 4, seed=1), -torch.ones(2, 61, 1)
    key[1] *= 0.05
    inputs = key, value, decay.double()
    options = {"method": method, "estimate": estimate, "otherwise": "raise"}
    both = solve(cell, inputs, **options)
    alone = [solve(cell, [x[row : row + 1] for x in inputs], **options) for row in (0, 1)]
    assert alone[0].iterations != alone[1].iterations
    assert both.iterations == max(x.iterations for x in alone)
    assert both.residual == max(x.residual for x in alone)
    for row in (0, 1):
        assert torch.equal(both.states[row], alone[row].states[0])


def test_lambda_falls_where_the_residual_falls():
    region = TrustRegion(Structure.BLOCK, "auto", 1e-12, False)
    states = torch.ones(1, 2, 3, 2)
    errors = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])[None, :, :, None]
    region._judge(states, states - errors)
    assert region.damping.shape == (1, 2, 3, 1) and (region.damping == START).all()
    later = errors.clone()
    later[0, 0, 1] = 0.9
    region._judge(states, states - later)
    grown = region.damping > START
    assert grown[0, 0, 1] and grown.sum() == 1
    assert torch.allclose(region.damping[grown], torch.tensor(FACTOR * START))
    assert torch.allclose(region.damping[~grown], torch.tensor(START / FACTOR))
    for _ in range(40):
        region._judge(states, states)
    assert torch.allclose(region.damping, torch.tensor(SMALLEST))
    for n in range(40):
        region._judge(states, states - n - 1)
    assert torch.allclose(region.damping, torch.tensor(LARGEST))


def test_a_number_stays():
    region = TrustRegion(Structure.DIAGONAL, 0.25, 1e-12, False)
    for n in range(3):
        region._judge(torch.ones(1, 4, 2), torch.full((1, 4, 2), float(n)))
        assert (region.damping == 0.25).all()


def test_what_is_not_finite_is_held_back():
    """A guess that makes the residual infinite counts as one that raised it."""
    region = TrustRegion(Structure.DENSE, "auto", 1e-12, False)
    states = torch.ones(1, 3, 2)
    region._judge(states, 0 * states)
    region._judge(states, states * torch.tensor([1.0, torch.nan]))
    assert (region.damping > START).all()
