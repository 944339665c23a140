"""The long convolution: what a caller can get wrong is named, in one line."""

import pytest
import torch

from supra.kernels.long_conv import chunk_ssm_conv, recurrent_ssm_conv, ssm_kernel

MISTAKES = {
    "value (shape [2, 7, 4]) must be [B, T, H, V]": {"value": torch.zeros(2, 7, 4)},
    "value (shape [2, 0, 4, 3]) must have at least one row and one token": {
        "value": torch.zeros(2, 0, 4, 3)
    },
    "value (shape [0, 7, 4, 3]) must have at least one row and one token": {
        "value": torch.zeros(0, 7, 4, 3)
    },
    "query (shape [2, 7, 2, 5]) must be [2, 7, 4, 5] to fit value": {
        "query": torch.zeros(2, 7, 2, 5)
    },
    "key (shape [2, 7, 4, 6]) must be [2, 7, 4, 5] to fit value": {"key": torch.zeros(2, 7, 4, 6)},
    "key (=None) is ones of width 1 and the other has 5; give both": {"key": None},
    "query (=None) is ones of width 1 and the other has 5; give both": {"query": None},
    "log_decay (shape [4]) must be [H, M]": {"log_decay": torch.zeros(4)},
    "log_decay (shape [3, 2]) must be [4, M] to fit value": {
        "log_decay": torch.zeros(3, 2), "frequency": torch.zeros(3, 2),
        "weight": torch.zeros(3, 2, 2), "skip": None,
    },
    "frequency (shape [4, 3]) must be [4, 2] to fit log_decay": {"frequency": torch.zeros(4, 3)},
    "weight (shape [4, 2]) must be [4, 2, 2] to fit log_decay": {"weight": torch.zeros(4, 2)},
    "skip (shape [4, 1]) must be [4] to fit log_decay": {"skip": torch.zeros(4, 1)},
    "weight (dtype torch.int64) must be floating point": {
        "weight": torch.zeros(4, 2, 2, dtype=torch.long)
    },
    "skip (on meta) must be on cpu": {"skip": torch.zeros(4, device="meta")},
    "unknown backend 'tritn': did you mean 'triton'?": {"backend": "tritn"},
    "backend (='triton') cannot run long_conv: its kernels compute in float32": {
        "backend": "triton", "skip": torch.zeros(4, dtype=torch.float64),
    },
    "initial_state (shape [2, 4, 2, 5, 3]) must be [2, 4, 2, 2, 5, 3] [N, H, M, 2, K, V]": {
        "initial_state": torch.zeros(2, 4, 2, 5, 3)
    },
}  # fmt: skip
CHUNK_MISTAKES = {
    "chunk_size (=0) must be >= 1": {"chunk_size": 0},
    "value (batch 2) must have one row when cu_seqlens is given": {
        "cu_seqlens": torch.tensor([0, 7])
    },
}
STEP_MISTAKES = {
    "in_place (=True) needs initial_state (=None) to write into": {"in_place": True},
    "must be contiguous and torch.float32 for in_place (=True)": {
        "in_place": True,
        "initial_state": torch.zeros(2, 4, 2, 2, 5, 3, dtype=torch.bfloat16),
    },
    "in_place (=True) has no gradient": {
        "in_place": True,
        "initial_state": torch.zeros(2, 4, 2, 2, 5, 3),
        "weight": torch.zeros(4, 2, 2, requires_grad=True),
    },
}


def zeros():
    return {
        "query": torch.zeros(2, 7, 4, 5),
        "key": torch.zeros(2, 7, 4, 5),
        "value": torch.zeros(2, 7, 4, 3),
        "log_decay": torch.zeros(4, 2),
        "frequency": torch.zeros(4, 2),
        "weight": torch.zeros(4, 2, 2),
        "skip": torch.zeros(4),
    }


@pytest.mark.parametrize("message", [*MISTAKES, *CHUNK_MISTAKES])
def test_mistakes_are_named_by_the_chunked_form(message):
    with pytest.raises(ValueError) as error:
        chunk_ssm_conv(**zeros() | (MISTAKES | CHUNK_MISTAKES)[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", [*MISTAKES, *STEP_MISTAKES])
def test_mistakes_are_named_by_the_recurrent_form(message):
    with pytest.raises(ValueError) as error:
        recurrent_ssm_conv(**zeros() | (MISTAKES | STEP_MISTAKES)[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_in_packing_are_named():
    inputs = {name: x[:1] if x.dim() == 4 else x for name, x in zeros().items()}
    with pytest.raises(ValueError, match=r"cu_seqlens \(from 0 to 6\) must go from 0 to T \(=7\)"):
        chunk_ssm_conv(**inputs, cu_seqlens=torch.tensor([0, 3, 6]))


def test_a_kernel_has_taps():
    model = {name: zeros()[name] for name in ("log_decay", "frequency", "weight")}
    with pytest.raises(ValueError, match=r"length \(=0\) must be >= 1"):
        ssm_kernel(**model, length=0)
