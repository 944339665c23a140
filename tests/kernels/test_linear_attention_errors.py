"""Linear attention: what a caller can get wrong is named, in one line."""

import pytest
import torch

from supra.kernels.linear_attention import chunk_linear_attention, recurrent_linear_attention

MISTAKES = {
    "query (shape [2, 6, 4]) must be [B, T, H, D]": {"query": torch.zeros(2, 6, 4)},
    "query (dtype torch.int64) must be floating point": {
        "query": torch.zeros(2, 7, 4, 5, dtype=torch.long)
    },
    "query (shape [2, 0, 4, 5]) must have at least one row and one token": {
        "query": torch.zeros(2, 0, 4, 5)
    },
    "query (shape [0, 7, 4, 5]) must have at least one row and one token": {
        "query": torch.zeros(0, 7, 4, 5)
    },
    "key (shape [2, 7, 2, 6]) must be [2, 7, Hkv, 5]": {"key": torch.zeros(2, 7, 2, 6)},
    "key (on meta) must be on cpu": {"key": torch.zeros(2, 7, 2, 5, device="meta")},
    "value (shape [2, 7, 1, 3]) must be [2, 7, 2, V]": {"value": torch.zeros(2, 7, 1, 3)},
    "query heads (=3) must be a multiple of key heads (=2)": {"query": torch.zeros(2, 7, 3, 5)},
    "log_decay (shape [3]) must be [H] or [2, 7, H] with H = 4 (query) or 2 (key)": {
        "log_decay": torch.zeros(3)
    },
    "log_decay (shape [7, 4]) must be": {"log_decay": torch.zeros(7, 4)},
    "unknown normalize 'sums': did you mean 'sum'? (known: None, sum)": {"normalize": "sums"},
    "unknown backend 'tritn': did you mean 'triton'?": {"backend": "tritn"},
    "backend (='triton') cannot run linear_attention: its kernels compute in float32": {
        "backend": "triton",
        "query": torch.zeros(2, 7, 4, 5, dtype=torch.float64),
    },
    "initial_state.memory (shape [2, 4, 5, 3]) must be [2, 2, 5, 3]": {
        "initial_state": (torch.zeros(2, 4, 5, 3), None)
    },
    "initial_state.normalizer (=None) must be given exactly when": {
        "initial_state": (torch.zeros(2, 2, 5, 3), None),
        "normalize": "sum",
    },
    "initial_state.normalizer (shape [2, 2, 3]) must be [2, 2, 5]": {
        "initial_state": (torch.zeros(2, 2, 5, 3), torch.zeros(2, 2, 3)),
        "normalize": "sum",
    },
}
CHUNK_MISTAKES = {
    "chunk_size (=0) must be >= 1": {"chunk_size": 0},
    "query (batch 2) must have one row when cu_seqlens is given": {
        "cu_seqlens": torch.tensor([0, 7])
    },
}
MEMORY = torch.zeros(2, 2, 5, 3)
IN_PLACE_MISTAKES = {
    "in_place (=True) needs initial_state (=None) to write into": {},
    "initial_state.memory (torch.float64, strides (30, 15, 3, 1)) must be contiguous and": {
        "initial_state": (MEMORY.double(), None)
    },
    "initial_state.memory (torch.float32, strides (30, 15, 1, 5)) must be contiguous and": {
        "initial_state": (torch.zeros(2, 2, 3, 5).mT, None)
    },
    "initial_state.normalizer (torch.bfloat16, strides (10, 5, 1)) must be contiguous and": {
        "initial_state": (MEMORY, torch.zeros(2, 2, 5, dtype=torch.bfloat16)),
        "normalize": "sum",
    },
    "in_place (=True) has no gradient; use torch.no_grad()": {
        "initial_state": (MEMORY.clone().requires_grad_(), None)
    },
}
PACKED_MISTAKES = {
    "cu_seqlens (from 1 to 7) must go from 0 to T (=7)": [1, 7],
    "cu_seqlens (from 0 to 6) must go from 0 to T (=7)": [0, 3, 6],
    "cu_seqlens (=5 then 4 at index 2) must not decrease": [0, 5, 4, 7],
    "cu_seqlens (shape [1], torch.int64) must be [N + 1] integers": [0],
    "cu_seqlens (shape [2], torch.float32) must be [N + 1] integers": [0.0, 7.0],
}


def zeros(batch=2):
    return {
        "query": torch.zeros(batch, 7, 4, 5),
        "key": torch.zeros(batch, 7, 2, 5),
        "value": torch.zeros(batch, 7, 2, 3),
    }


@pytest.mark.parametrize("message", [*MISTAKES, *CHUNK_MISTAKES])
def test_mistakes_are_named(message):
    functions = [chunk_linear_attention]
    functions += [recurrent_linear_attention] if message in MISTAKES else []
    for function in functions:
        with pytest.raises(ValueError) as error:
            function(**zeros() | (MISTAKES | CHUNK_MISTAKES)[message])
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", IN_PLACE_MISTAKES)
def test_mistakes_in_place_are_named(message):
    with pytest.raises(ValueError) as error:
        recurrent_linear_attention(**zeros(), in_place=True, **IN_PLACE_MISTAKES[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", PACKED_MISTAKES)
def test_mistakes_in_packing_are_named(message):
    with pytest.raises(ValueError) as error:
        chunk_linear_attention(**zeros(1), cu_seqlens=torch.tensor(PACKED_MISTAKES[message]))
    assert message in str(error.value)
