"""The causal convolution: what a caller can get wrong is named, in one line."""

import pytest
import torch

from supra.kernels.causal_conv import causal_conv, causal_conv_step

MISTAKES = {
    "input (shape [7, 5, 1, 1]) must be [B, T, D]": {"input": torch.zeros(7, 5, 1, 1)},
    "input (shape [0, 1, 5]) must have at least one row and one token": {
        "input": torch.zeros(0, 1, 5)
    },
    "input (dtype torch.int64) must be floating": {"input": torch.zeros(2, 1, 5, dtype=torch.long)},
    "weight (shape [5, 1, 4]) must be [5, W] to fit input; from a Conv1d take weight[:, 0]": {
        "weight": torch.zeros(5, 1, 4)
    },
    "weight (shape [4, 5]) must be [5, W]": {"weight": torch.zeros(4, 5)},
    "weight (shape [5, 0]) must have 1 to 64 taps": {"weight": torch.zeros(5, 0)},
    "weight (shape [5, 65]) must have 1 to 64 taps": {"weight": torch.zeros(5, 65)},
    "weight (on meta) must be on cpu": {"weight": torch.zeros(5, 4, device="meta")},
    "bias (shape [4]) must be [5] to fit input": {"bias": torch.zeros(4)},
    "unknown activation 'silus': did you mean 'silu'? (known: None, silu)": {"activation": "silus"},
    "unknown backend 'tritn': did you mean 'triton'?": {"backend": "tritn"},
    "backend (='triton') cannot run causal_conv: its kernels compute in float32": {
        "backend": "triton",
        "weight": torch.zeros(5, 4, dtype=torch.float64),
    },
}
SEQUENCE_MISTAKES = {
    "input (shape [2, 0, 5]) must have at least one row and one token": {
        "input": torch.zeros(2, 0, 5)
    },
    "initial_state (shape [2, 5, 3]) must be [2, 3, 5] [N, W - 1, D]": {
        "initial_state": torch.zeros(2, 5, 3)
    },
    "initial_state (on meta) must be on cpu": {
        "initial_state": torch.zeros(2, 3, 5, device="meta")
    },
    "input (batch 2) must have one row when cu_seqlens is given": {
        "cu_seqlens": torch.tensor([0, 7])
    },
}
PACKED_MISTAKES = {
    "cu_seqlens (from 1 to 7) must go from 0 to T (=7)": [1, 7],
    "cu_seqlens (=5 then 4 at index 2) must not decrease": [0, 5, 4, 7],
    "cu_seqlens (shape [2], torch.float32) must be [N + 1] integers": [0.0, 7.0],
}
STEP_MISTAKES = {
    "input (shape [2, 2, 5]) must be [B, D] or [B, 1, D]": {"input": torch.zeros(2, 2, 5)},
    "state (shape [2, 5, 3]) must be [2, 3, 5] [N, W - 1, D]": {"state": torch.zeros(2, 5, 3)},
    "state (=None) must be [B, W - 1, D]; give zeros": {"state": None},
}
IN_PLACE_MISTAKES = {
    "state (torch.float16, strides (15, 5, 1)) must be contiguous and torch.float32": {
        "state": torch.zeros(2, 3, 5, dtype=torch.float16)
    },
    "state (torch.float32, strides (15, 1, 3)) must be contiguous and torch.float32": {
        "state": torch.zeros(2, 5, 3).mT
    },
    "in_place (=True) has no gradient": {"weight": torch.zeros(5, 4, requires_grad=True)},
}


def fails(function, message, **arguments):
    with pytest.raises(ValueError) as error:
        function(**{"weight": torch.zeros(5, 4)} | arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", [*MISTAKES, *SEQUENCE_MISTAKES])
def test_mistakes_are_named(message):
    arguments = {"input": torch.zeros(2, 7, 5)} | (MISTAKES | SEQUENCE_MISTAKES)[message]
    fails(causal_conv, message, **arguments)


@pytest.mark.parametrize("message", PACKED_MISTAKES)
def test_mistakes_in_packing_are_named(message):
    cu_seqlens = torch.tensor(PACKED_MISTAKES[message])
    fails(causal_conv, message, input=torch.zeros(1, 7, 5), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("message", [*MISTAKES, *STEP_MISTAKES])
def test_mistakes_in_a_step_are_named(message, in_place):
    arguments = {"input": torch.zeros(2, 5), "state": torch.zeros(2, 3, 5), "in_place": in_place}
    fails(causal_conv_step, message, **arguments | (MISTAKES | STEP_MISTAKES)[message])


@pytest.mark.parametrize("message", IN_PLACE_MISTAKES)
def test_mistakes_in_a_step_in_place_are_named(message):
    arguments = {"input": torch.zeros(2, 5), "state": torch.zeros(2, 3, 5), "in_place": True}
    fails(causal_conv_step, message, **arguments | IN_PLACE_MISTAKES[message])
