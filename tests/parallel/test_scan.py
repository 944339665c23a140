"""Scans against loops, and the Kalman smoother against a dense Levenberg–Marquardt step."""

import pytest
import torch

from supra.parallel.kalman import trust_region_step
from supra.parallel.scan import Structure, affine_scan, associative_scan

SHAPES = {Structure.DIAGONAL: (3, 2), Structure.BLOCK: (3, 2, 2), Structure.DENSE: (4, 4)}


def make(structure, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES[structure]
    state = shape if structure is Structure.DIAGONAL else shape[:-1]

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    return 0.6 * normal(2, tokens, *shape), normal(2, tokens, *state), normal(2, *state)


@pytest.mark.parametrize("tokens", [1, 2, 9, 10, 50])
@pytest.mark.parametrize("structure", Structure)
def test_affine_scan_is_the_loop(structure, tokens):
    matrix, bias, x = make(structure, tokens)
    expected, start = [], x
    for t in range(tokens):
        x = structure.apply(matrix[:, t], x) + bias[:, t]
        expected.append(x)
    expected = torch.stack(expected, 1)
    assert torch.allclose(affine_scan(structure, matrix, bias, start), expected, atol=1e-12)
    flipped = affine_scan(structure, matrix.flip(1), bias.flip(1), start, reverse=True)
    assert torch.allclose(flipped.flip(1), expected, atol=1e-12)
    from_zero = affine_scan(structure, matrix, bias)
    assert torch.allclose(from_zero[:, 0], bias[:, 0])


@pytest.mark.parametrize("structure", Structure)
def test_structures_are_matrices(structure):
    first, x, _ = make(structure, 3)
    second, *_ = make(structure, 3, seed=1)
    both = structure.apply(structure.compose(second, first), x)
    assert torch.allclose(both, structure.apply(second, structure.apply(first, x)))
    identity = structure.constant(1.0, x)
    assert torch.equal(structure.apply(identity, x), x)
    assert structure.diagonal(first).shape == x.shape
    inner = (structure.apply(structure.transpose(first), x) * x).sum()
    assert torch.allclose(inner, (x * structure.apply(first, x)).sum())


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 33])
def test_associative_scan_keeps_the_order(tokens):
    """Products of matrices, because they do not commute."""
    matrices = make(Structure.DENSE, tokens)[0]
    (found,) = associative_scan(lambda a, b: (b[0] @ a[0],), (matrices,))
    product = torch.eye(4, dtype=torch.float64)
    for t in range(tokens):
        product = matrices[:, t] @ product
        assert torch.allclose(found[:, t], product, atol=1e-12)


@pytest.mark.parametrize("damping", [1e-3, 0.3, 20.0])
@pytest.mark.parametrize("structure", Structure)
def test_the_smoother_is_a_dense_levenberg_marquardt_step(structure, damping):
    """The smoother's means are argmin ½|r + J Δ|² + ½λ|Δ|²; the filter's are not."""
    matrix, value, _ = make(structure, 8)
    matrix[:, 0] = 0
    guess = make(structure, 8, seed=3)[1]
    before = torch.cat([torch.zeros_like(guess[:, :1]), guess[:, :-1]], dim=1)
    bias = value - structure.apply(matrix, before)
    held = torch.full_like(guess[..., :1], damping)
    smooth, filtered = (
        trust_region_step(structure, matrix, bias, guess, held, x) for x in (True, False)
    )
    dense, size = _dense(structure, matrix[:, :], guess), guess[0, 0].numel()
    for row in range(2):
        jacobian = torch.eye(8 * size, dtype=torch.float64)
        for t in range(1, 8):
            at = slice(t * size, (t + 1) * size), slice((t - 1) * size, t * size)
            jacobian[at] -= dense[row, t]
        residual = (guess - value)[row].flatten()
        normal = jacobian.T @ jacobian + damping * torch.eye(8 * size, dtype=torch.float64)
        step = torch.linalg.solve(normal, -jacobian.T @ residual)
        expected = guess[row].flatten() + step
        assert (smooth[row].flatten() - expected).abs().max() < 1e-10
        assert (filtered[row].flatten() - expected).abs().max() > 1e-4
    newton = affine_scan(structure, matrix, bias)
    little, much = (torch.full_like(guess[..., :1], x) for x in (1e-12, 1e12))
    near = trust_region_step(structure, matrix, bias, guess, little, True)
    assert torch.allclose(near, newton, atol=1e-8)
    far = trust_region_step(structure, matrix, bias, guess, much, True)
    assert torch.allclose(far, guess, atol=1e-8)


def _dense(structure, matrix, like):
    """A_t as matrices [B, T, N, N] over all elements of a token's state."""
    size = like[0, 0].numel()
    columns = []
    for n in range(size):
        unit = torch.zeros(size, dtype=torch.float64)
        unit[n] = 1
        columns.append(structure.apply(matrix, unit.view(like.shape[2:]).expand_as(like)))
    return torch.stack([x.flatten(2) for x in columns], dim=-1)
