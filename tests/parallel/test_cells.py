"""Cells against those of torch, and their Jacobians against automatic differentiation."""

import pytest
import torch
from torch import nn

from supra.errors import UserError
from supra.parallel import GRU, LSTM, Cell, NonlinearGated, solve
from supra.parallel.scan import Structure
from tests.parallel.examples import NAMES, example


@pytest.mark.parametrize("name", NAMES)
def test_jacobians_are_automatic_ones(name):
    """The closed form, the base class's version and the product agree."""
    cell, inputs, state, _ = example(name, tokens=1, batch=3)
    drive = tuple(x[:, 0] for x in cell.project(inputs))
    value, found = cell.linearise(state, drive)
    assert torch.equal(value, cell.step(state, drive))
    generic = Cell.linearise(cell, state, drive)
    assert torch.allclose(generic[0], value) and torch.allclose(generic[1], found, atol=1e-12)
    full = torch.autograd.functional.jacobian(lambda x: cell.step(x, drive), state)
    size = state[0].numel()
    full = full.reshape(3, size, 3, size)
    tangent = torch.randn(state.shape, generator=torch.Generator().manual_seed(0)).double()
    for row in range(3):
        expected = (full[row, :, row] @ tangent[row].flatten()).view(state.shape[1:])
        assert torch.allclose(cell.structure.apply(found, tangent)[row], expected, atol=1e-12)
    product = cell.jacobian_product(state, drive, tangent)[1]
    assert torch.allclose(product, cell.structure.apply(found, tangent), atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), [(GRU, nn.GRU), (LSTM, nn.LSTM)])
def test_dense_cells_are_torchs(ours, theirs):
    cell, module = ours(5, 6), theirs(5, 6, batch_first=True)
    for name, layer in (("ih", cell.input), ("hh", cell.hidden)):
        for kind in ("weight", "bias"):
            getattr(layer, kind).data.copy_(getattr(module, f"{kind}_{name}_l0"))
    inputs = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0))
    found = solve(cell, inputs, None, "deer").states[..., -6:]
    assert torch.allclose(found, module(inputs)[0], atol=1e-5)


def test_nonlinear_gated_is_linear_attention_at_zero():
    """With a = 0 and small writes, the step is f S + (1 − f) k vᵀ."""
    _, (key, value, log_decay), _, _ = example("nonlinear_gated")
    cell = NonlinearGated(torch.zeros(2, 3, 4, dtype=torch.float64))
    found = solve(cell, (1e-4 * key, value, log_decay), None, "deer").states
    state = torch.zeros_like(found[:, 0])
    for t in range(found.shape[1]):
        keep = log_decay[:, t].exp()[..., None, None]
        written = 1e-4 * key[:, t, :, :, None] * value[:, t, :, None, :]
        state = keep * state + (1 - keep) * written
        assert torch.allclose(found[:, t], state, atol=1e-10)


@pytest.mark.parametrize("weight", [0.5, 0.9])
def test_nonlinear_gated_contracts_and_converges_in_five_sweeps(weight):
    """With |a| < 1 and the linear guess, it converges to float32's accuracy at T = 2048."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.rand(2, 16, 16, generator=generator) * 2 - 1
    cell = NonlinearGated(weight * bounds / bounds.abs().max())
    key, value = (torch.randn(1, 2048, 2, 16, generator=generator) for _ in range(2))
    key = nn.functional.normalize(key, dim=-1)
    log_decay = nn.functional.logsigmoid(torch.randn(1, 2048, 2, generator=generator))
    drive = cell.project((key, value, log_decay))
    _, slope = cell.linearise(torch.zeros(1, 2048, 2, 16, 16), drive)
    assert slope.abs().max() < 1
    found = solve(cell, (key, value, log_decay), None, "deer", otherwise="raise")
    assert found.iterations <= 5 and found.residual <= 2e-6
    exact = solve(
        cell.double(), tuple(x.double() for x in (key, value, log_decay)), None, "sequential"
    ).states
    assert (found.states - exact).abs().max() < 5e-6


def test_bistable_cells_diverge_and_are_caught():
    """With |a| up to 2.4 and fast gates, Newton's method fails, this is noticed, and the loop takes
    over."""
    generator = torch.Generator().manual_seed(0)
    cell = NonlinearGated(4.8 * torch.rand(2, 8, 8, generator=generator) - 2.4)
    key, value = (torch.randn(1, 512, 2, 8, generator=generator) for _ in range(2))
    log_decay = nn.functional.logsigmoid(torch.randn(1, 512, 2, generator=generator))
    with pytest.warns(UserWarning, match="deer left a residual"):
        found = solve(cell, (key, value, log_decay), None, "deer", max_iterations=8)
    assert found.fell_back
    expected = solve(cell, (key, value, log_decay), None, "sequential").states
    assert torch.equal(found.states, expected) and expected.abs().max() <= 1


def test_shapes_that_do_not_agree():
    cell, (key, value, log_decay), _, _ = example("nonlinear_gated")
    with pytest.raises(UserError, match=r"must have the same B, T and H"):
        cell.project((key, value[:, 1:], log_decay))
    assert cell.structure is Structure.DIAGONAL
