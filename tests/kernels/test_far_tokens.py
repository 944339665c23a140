"""Tokens more than 2^31 numbers apart: kernels find them, because they count places in 64 bits."""

import pytest
import torch

from supra.kernels.gated_delta_rule import chunk_gated_delta_rule
from supra.kernels.gated_linear_attention import chunk_gated_linear_attention
from supra.kernels.kda import chunk_kda
from supra.kernels.linear_attention import chunk_linear_attention
from supra.kernels.nonlinear_gated import chunk_nonlinear_gated

# of two neighbours: 128 tokens of a chunk are still found in 32 bits, the next chunk is not
DISTANCE, TOKENS, WIDTH = 1 << 24, 131, 16


@pytest.fixture
def far(tmp_path):
    """Copies tensors [1, T, ...] into a file without contents, which takes no room on the disk."""
    room = torch.from_file(str(tmp_path / "room"), shared=True, size=TOKENS * DISTANCE)
    used = 0

    def copied(x):
        nonlocal used
        strides = (x.shape[1] * DISTANCE, DISTANCE, *x.stride()[2:])
        copy = room.as_strided(x.shape, strides, used).copy_(x)
        used += x[0, 0].numel()
        return copy

    return copied


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(operation):
    """Arguments [1, T, ...] of an operation, those that may lie far apart."""
    query, key, value = (random(1, TOKENS, 1, WIDTH, seed=seed) for seed in range(3))
    beta, decay = (random(1, TOKENS, 1, seed=seed).sigmoid() for seed in (3, 4))
    channel_decay = random(1, TOKENS, 1, WIDTH, seed=5).sigmoid()
    shared = {"query": query / 4, "key": key / 8, "value": value}
    return (
        shared
        | {
            chunk_linear_attention: {"log_decay": decay.log()},
            chunk_gated_linear_attention: {"log_decay": channel_decay.log()},
            chunk_gated_delta_rule: {"beta": beta, "log_decay": decay.log()},
            chunk_kda: {"beta": beta, "log_decay": channel_decay.log()},
            chunk_nonlinear_gated: {"log_decay": decay.log()},
        }[operation]
    )


@pytest.mark.parametrize(
    "operation",
    [
        chunk_linear_attention,
        chunk_gated_linear_attention,
        chunk_gated_delta_rule,
        chunk_kda,
        chunk_nonlinear_gated,
    ],
    ids=lambda x: x.__name__,
)
def test_results_are_those_of_near_tokens(operation, far):
    near, found = inputs_of(operation), []
    weight = random(1, WIDTH, WIDTH, seed=6) / 4
    own = {"weight": weight} if operation is chunk_nonlinear_gated else {}
    for given in (near, {name: far(x) for name, x in near.items()}):
        given = {name: x.requires_grad_() for name, x in given.items()}
        output, _ = operation(**given, **own, backend="triton")
        d_output = given["value"].detach()
        found.append([output, *torch.autograd.grad(output, list(given.values()), d_output)])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)
