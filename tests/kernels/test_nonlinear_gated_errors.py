"""The nonlinear gated recurrence: what a caller can get wrong is named, in one line."""

import pytest
import torch

from supra.kernels.nonlinear_gated import chunk_nonlinear_gated, recurrent_nonlinear_gated

MISTAKES = {
    "query (shape [2, 6, 4]) must be [B, T, H, D]": {"query": torch.zeros(2, 6, 4)},
    "query (shape [0, 7, 4, 5]) must have at least one row and one token": {
        "query": torch.zeros(0, 7, 4, 5)
    },
    "key (shape [2, 7, 4, 6]) must be [2, 7, Hkv, 5]": {"key": torch.zeros(2, 7, 4, 6)},
    "value (shape [2, 7, 1, 3]) must be [2, 7, 4, V]": {"value": torch.zeros(2, 7, 1, 3)},
    "key (shape [2, 7, 2, 5]) must have 4 heads, as query has; repeat them": {
        "key": torch.zeros(2, 7, 2, 5),
        "value": torch.zeros(2, 7, 2, 3),
    },
    "log_decay (dtype torch.int64) must be floating point": {
        "log_decay": torch.zeros(2, 7, 4, dtype=torch.long)
    },
    "log_decay (shape [2, 7, 4, 5]) must be [2, 7, 4] [B, T, H]": {
        "log_decay": torch.zeros(2, 7, 4, 5)
    },
    "weight (shape [4, 3, 5]) must be [4, 5, 3] [H, K, V]": {"weight": torch.zeros(4, 3, 5)},
    "weight (on meta) must be on cpu": {"weight": torch.zeros(4, 5, 3, device="meta")},
    "unknown backend 'tritn': did you mean 'triton'?": {"backend": "tritn"},
    "backend (='triton') cannot run nonlinear_gated: its kernels compute in float32": {
        "backend": "triton",
        "weight": torch.zeros(4, 5, 3, dtype=torch.float64),
    },
    "initial_state (shape [2, 4, 3, 5]) must be [2, 4, 5, 3] [N, Hkv, K, V]": {
        "initial_state": torch.zeros(2, 4, 3, 5)
    },
}
CHUNK_MISTAKES = {
    "sweeps (=0) must be >= 1": {"sweeps": 0},
    "tolerance (=-1.0) must be >= 0": {"tolerance": -1.0},
    "tolerance (=nan) must be >= 0": {"tolerance": float("nan")},
    "chunk_size (=24) must be a power of two up to 64": {"chunk_size": 24},
    "chunk_size (=0) must be a power of two up to 64": {"chunk_size": 0},
    "query (batch 2) must have one row when cu_seqlens is given": {
        "cu_seqlens": torch.tensor([0, 7])
    },
}
STEP_MISTAKES = {
    "in_place (=True) needs initial_state (=None) to write into": {"in_place": True},
    "must be contiguous and torch.float32 for in_place (=True)": {
        "in_place": True,
        "initial_state": torch.zeros(2, 4, 5, 3, dtype=torch.bfloat16),
    },
    "in_place (=True) has no gradient": {
        "in_place": True,
        "initial_state": torch.zeros(2, 4, 5, 3),
        "weight": torch.zeros(4, 5, 3, requires_grad=True),
    },
}


def zeros():
    return {
        "query": torch.zeros(2, 7, 4, 5),
        "key": torch.zeros(2, 7, 4, 5),
        "value": torch.zeros(2, 7, 4, 3),
        "log_decay": torch.zeros(2, 7, 4),
        "weight": torch.zeros(4, 5, 3),
    }


@pytest.mark.parametrize("message", [*MISTAKES, *CHUNK_MISTAKES])
def test_mistakes_are_named_by_the_chunked_form(message):
    with pytest.raises(ValueError) as error:
        chunk_nonlinear_gated(**zeros() | (MISTAKES | CHUNK_MISTAKES)[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", [*MISTAKES, *STEP_MISTAKES])
def test_mistakes_are_named_by_the_recurrent_form(message):
    with pytest.raises(ValueError) as error:
        recurrent_nonlinear_gated(**zeros() | (MISTAKES | STEP_MISTAKES)[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_in_packing_are_named():
    inputs = {name: x if name == "weight" else x[:1] for name, x in zeros().items()}
    with pytest.raises(ValueError, match=r"cu_seqlens \(from 0 to 6\) must go from 0 to T \(=7\)"):
        chunk_nonlinear_gated(**inputs, cu_seqlens=torch.tensor([0, 3, 6]))
