"""Chunks are computed block by block: how they are cut into blocks changes nothing."""

import pytest
import torch

from supra.kernels import chunks
from supra.kernels.gated_delta_rule import chunk_gated_delta_rule
from supra.kernels.gated_linear_attention import chunk_gated_linear_attention
from supra.kernels.kda import chunk_kda
from tests.kernels import test_gated_delta_rule as delta
from tests.kernels import test_gated_linear_attention as gated
from tests.kernels import test_kda as kda

OPERATIONS = {
    "gated_delta_rule": (
        chunk_gated_delta_rule,
        lambda batch, length: delta.make_inputs(batch, length, 4, 2, 5, 4, "token"),
    ),
    "kda": (chunk_kda, lambda batch, length: kda.make_inputs(batch, length, 4, 2, 5, 4)),
    "gated_linear_attention": (
        chunk_gated_linear_attention,
        lambda batch, length: gated.make_inputs(batch, length, 4, 2, 5, 4, "rwkv6"),
    ),
}
PACKED = [0, 0, 1, 20, 20, 53, 54, 90]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("bounds", [None, PACKED])
def test_the_size_of_a_block_changes_nothing(operation, bounds, monkeypatch):
    function, make_inputs = OPERATIONS[operation]
    inputs = make_inputs(*((3, 45) if bounds is None else (1, bounds[-1])))
    state = delta.make_state(inputs, sequences=None if bounds is None else len(bounds) - 1)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    found = []
    for rows in (1, 40, 100, 4096):  # one chunk of 8 tokens and 2 heads has 16
        monkeypatch.setattr(chunks, "BLOCK_ROWS", rows)
        results = delta.run_with_gradients(
            function, inputs, state, cu_seqlens=cu_seqlens, chunk_size=8, scale=0.7
        )
        found.append(results)
    for other in found[:-1]:
        delta.assert_close(other, found[-1], 1e-13)
