"""Ridge regression, and the direction of hidden states in which all tokens are alike."""

import torch
from torch import Tensor

# On SmolLM2-135M, layers 2 to 23, w·u of 768 other tokens is 1 within 0.04 (standard deviation),
# and at least 0.79. With 1e-3 it is 1 within 0.06.
DIRECTION_RIDGE = 0.01


def ridge_regression(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """The W [D, E] that minimises |y − xW|² + ridge · |x|² / D · |W|².

    x: [..., D]. y: [..., E]. An infinite ridge gives W = 0.
    """
    x, y = (z.flatten(0, -2).double() for z in (x, y))
    square = x.mT @ x
    if ridge == torch.inf:
        return torch.zeros_like(x.mT @ y).float()
    square.diagonal().add_(ridge * square.diagonal().mean().clamp(min=1e-30))
    return torch.linalg.solve(square, x.mT @ y).float()


def constant_direction(hidden_states: Tensor) -> Tensor:
    """The w [D] with w·u ≈ 1 for all tokens u of [..., D]. A linear layer without a bias can add
    one with it: Wu + b ≈ (W + bwᵀ)u."""
    ones = torch.ones_like(hidden_states[..., :1])
    return ridge_regression(hidden_states, ones, DIRECTION_RIDGE)[:, 0]
