"""Ridge regression, and gates without a bias that start as if they had one."""

import torch

from supra.mixers import AttentionShape
from supra.mixers.read_out import SiLUGate
from supra.mixers.ridge import constant_direction, ridge_regression


def test_ridge_regression_solves_its_equation():
    torch.manual_seed(0)
    x, y = torch.randn(3, 20, 5).double(), torch.randn(3, 20, 2).double()
    weights = ridge_regression(x, y, 0.3).double().requires_grad_()
    loss = (y - x @ weights).square().sum() + 0.3 * x.square().sum() / 5 * weights.square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 1e-4
    assert not ridge_regression(x, y, torch.inf).any()


def test_a_direction_in_which_tokens_are_alike_stands_for_a_bias():
    """Also of tokens that it was not fitted on: hidden states with one feature that varies little,
    as those of pretrained models have."""
    torch.manual_seed(0)
    hidden_states = torch.randn(2, 400, 12)
    hidden_states[..., 3] = 8 + 0.2 * torch.randn(2, 400)
    direction = constant_direction(hidden_states[:1])
    gate = SiLUGate(AttentionShape(3, 3, 5, 7, 12), bias=False)
    gate.reset_parameters()
    assert not gate(hidden_states).any()
    gate.open(direction)
    torch.testing.assert_close(gate(hidden_states[1:]), torch.ones(1, 400, 3, 7), atol=0.2, rtol=0)


def test_a_gate_follows_what_an_output_lacks():
    """A factor per token and head that is a linear function of the hidden states. The ridge halves
    what it finds here, since the hidden states have a mean square of 1."""
    torch.manual_seed(0)
    hidden_states = torch.randn(2, 400, 12)
    hidden_states[..., 3] = 1
    gate = SiLUGate(AttentionShape(3, 3, 5, 7, 12), bias=False)
    gate.open(constant_direction(hidden_states))
    output = torch.randn(2, 400, 3, 7)
    factor = 1 + 0.1 * hidden_states[..., :3]
    target = factor[..., None] * output
    before = (gate(hidden_states) * output - target).square().sum()
    gate.follow(hidden_states, output, target)
    after = (gate(hidden_states) * output - target).square().sum()
    assert after < 0.35 * before
