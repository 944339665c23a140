"""Gated linear attention: what a caller can get wrong is named, in one line."""

import pytest
import torch

from supra.kernels.gated_linear_attention import (
    chunk_gated_linear_attention,
    recurrent_gated_linear_attention,
)

MISTAKES = {
    "query (shape [2, 6, 4]) must be [B, T, H, D]": {"query": torch.zeros(2, 6, 4)},
    "query (shape [0, 7, 4, 5]) must have at least one row and one token": {
        "query": torch.zeros(0, 7, 4, 5)
    },
    "key (shape [2, 7, 2, 6]) must be [2, 7, Hkv, 5]": {"key": torch.zeros(2, 7, 2, 6)},
    "value (shape [2, 7, 1, 3]) must be [2, 7, 2, V]": {"value": torch.zeros(2, 7, 1, 3)},
    "query heads (=3) must be a multiple of key heads (=2)": {"query": torch.zeros(2, 7, 3, 5)},
    "log_decay (dtype torch.int64) must be floating point": {
        "log_decay": torch.zeros(2, 7, 2, 5, dtype=torch.long)
    },
    "log_decay (shape [2, 7, 2]) must be [2, 7, 2, 5] [B, T, Hkv, K], as key is": {
        "log_decay": torch.zeros(2, 7, 2)
    },
    "bonus (shape [2, 5]) must be [4, 5] [Hq, K]": {"bonus": torch.zeros(2, 5)},
    "bonus (on meta) must be on cpu": {"bonus": torch.zeros(4, 5, device="meta")},
    "unknown backend 'tritn': did you mean 'triton'?": {"backend": "tritn"},
    "backend (='triton') cannot run gated_linear_attention: its kernels compute in float32": {
        "backend": "triton",
        "log_decay": torch.zeros(2, 7, 2, 5, dtype=torch.float64),
    },
    "initial_state (shape [2, 4, 5, 3]) must be [2, 2, 5, 3] [N, Hkv, K, V]": {
        "initial_state": torch.zeros(2, 4, 5, 3)
    },
}
CHUNK_MISTAKES = {
    "chunk_size (=0) must be >= 1": {"chunk_size": 0},
    "query (batch 2) must have one row when cu_seqlens is given": {
        "cu_seqlens": torch.tensor([0, 7])
    },
}
STEP_MISTAKES = {
    "in_place (=True) needs initial_state (=None) to write into": {"in_place": True},
    "must be contiguous and torch.float32 for in_place (=True)": {
        "in_place": True,
        "initial_state": torch.zeros(2, 2, 5, 3, dtype=torch.bfloat16),
    },
    "in_place (=True) has no gradient": {
        "in_place": True,
        "initial_state": torch.zeros(2, 2, 5, 3),
        "query": torch.zeros(2, 7, 4, 5, requires_grad=True),
    },
}


def zeros():
    return {
        "query": torch.zeros(2, 7, 4, 5),
        "key": torch.zeros(2, 7, 2, 5),
        "value": torch.zeros(2, 7, 2, 3),
        "log_decay": torch.zeros(2, 7, 2, 5),
    }


@pytest.mark.parametrize("message", [*MISTAKES, *CHUNK_MISTAKES])
def test_mistakes_are_named_by_the_chunked_form(message):
    with pytest.raises(ValueError) as error:
        chunk_gated_linear_attention(**zeros() | (MISTAKES | CHUNK_MISTAKES)[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", [*MISTAKES, *STEP_MISTAKES])
def test_mistakes_are_named_by_the_recurrent_form(message):
    with pytest.raises(ValueError) as error:
        recurrent_gated_linear_attention(**zeros() | (MISTAKES | STEP_MISTAKES)[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_in_packing_are_named():
    inputs = {name: x[:1] for name, x in zeros().items()}
    with pytest.raises(ValueError, match=r"cu_seqlens \(from 0 to 6\) must go from 0 to T \(=7\)"):
        chunk_gated_linear_attention(**inputs, cu_seqlens=torch.tensor([0, 3, 6]))
