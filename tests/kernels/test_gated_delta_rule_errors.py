"""The gated delta rule: what a caller can get wrong is named, in one line."""

import pytest
import torch

from supra.kernels.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule

STATE = torch.zeros(2, 2, 5, 3)
MISTAKES = {
    "query (shape [2, 6, 4]) must be [B, T, H, D]": {"query": torch.zeros(2, 6, 4)},
    "query (shape [0, 7, 4, 5]) must have at least one row and one token": {
        "query": torch.zeros(0, 7, 4, 5)
    },
    "key (shape [2, 7, 2, 6]) must be [2, 7, Hkv, 5]": {"key": torch.zeros(2, 7, 2, 6)},
    "query heads (=3) must be a multiple of key heads (=2)": {"query": torch.zeros(2, 7, 3, 5)},
    "beta (shape [2, 7, 4]) must be [2, 7, 2] to fit key": {"beta": torch.zeros(2, 7, 4)},
    "beta (dtype torch.int64) must be floating point": {
        "beta": torch.zeros(2, 7, 2, dtype=torch.long)
    },
    "log_decay (shape [4]) must be [2] or [2, 7, 2] to fit key": {"log_decay": torch.zeros(4)},
    "unknown backend 'tritn': did you mean 'triton'?": {"backend": "tritn"},
    "backend (='triton') cannot run gated_delta_rule: its kernels compute in float32": {
        "backend": "triton",
        "query": torch.zeros(2, 7, 4, 5, dtype=torch.float64),
    },
    "initial_state (shape [2, 4, 5, 3]) must be [2, 2, 5, 3] [N, Hkv, K, V]": {
        "initial_state": torch.zeros(2, 4, 5, 3)
    },
    "initial_state (on meta) must be on cpu": {"initial_state": STATE.to("meta")},
}
CHUNK_MISTAKES = {
    "chunk_size (=0) must be >= 1": {"chunk_size": 0},
    "query (batch 2) must have one row when cu_seqlens is given": {
        "cu_seqlens": torch.tensor([0, 7])
    },
}
RECURRENT_MISTAKES = {
    "in_place (=True) needs initial_state (=None) to write into; give zeros": {"in_place": True},
    "in_place (=True) has no gradient; use torch.no_grad(), or leave in_place out": {
        "in_place": True,
        "initial_state": STATE,
        "query": torch.zeros(2, 7, 4, 5, requires_grad=True),
    },
    "initial_state (torch.float16, strides (30, 15, 3, 1)) must be contiguous and torch.float32": {
        "in_place": True,
        "initial_state": STATE.half(),
    },
    "initial_state (torch.float32, strides (30, 15, 1, 5)) must be contiguous and torch.float32": {
        "in_place": True,
        "initial_state": torch.zeros(2, 2, 3, 5).mT,
    },
}


def zeros():
    return {
        "query": torch.zeros(2, 7, 4, 5),
        "key": torch.zeros(2, 7, 2, 5),
        "value": torch.zeros(2, 7, 2, 3),
        "beta": torch.zeros(2, 7, 2),
    }


def assert_names(message, function, changes):
    with pytest.raises(ValueError) as error:
        function(**zeros() | changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", [*MISTAKES, *CHUNK_MISTAKES])
def test_mistakes_in_the_chunked_form_are_named(message):
    assert_names(message, chunk_gated_delta_rule, (MISTAKES | CHUNK_MISTAKES)[message])


@pytest.mark.parametrize("message", [*MISTAKES, *RECURRENT_MISTAKES])
def test_mistakes_in_the_recurrent_form_are_named(message):
    assert_names(message, recurrent_gated_delta_rule, (MISTAKES | RECURRENT_MISTAKES)[message])
