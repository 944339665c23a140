"""The arithmetic of work, each part by hand."""

import pytest

from supra.planning import compute
from supra.planning.compute import Work


def test_six_flops_per_parameter_and_token():
    work = Work(products=1000, blocks=900, trained=1000, state=0)
    assert compute.end_to_end(work, 8, checkpointing=False) == 6000
    assert compute.end_to_end(work, 8, checkpointing=True) == 6000 + 2 * 900


def test_frozen_weights_have_no_gradient():
    work = Work(products=1000, blocks=900, trained=100, state=0)
    assert compute.end_to_end(work, 8, checkpointing=False) == 4 * 1000 + 2 * 100


def test_states_kept_attention_and_the_teacher():
    work = Work(
        products=1000, blocks=900, trained=1000, state=50, softmax=12, teacher=800,
        teacher_softmax=24,
    )  # fmt: skip
    mixing = 4 * 50 + 12 * 8  # a token meets 4 of 8 tokens, with 2 FLOPs per channel
    assert compute.end_to_end(work, 8, checkpointing=False) == 6000 + 3 * mixing + 1600 + 24 * 8


def test_layers_alone():
    work = Work(
        products=1000, blocks=900, trained=250, state=50, attention=300, teacher=800,
        teacher_softmax=24,
    )  # fmt: skip
    student = 4 * 300 + 2 * 250 + 3 * 4 * 50
    assert compute.layer_by_layer(work, 8) == student + 1600 + 24 * 8


def test_hours():
    """One GPU of 1 TFLOP/s at half of it does 1.8e15 FLOPs in an hour."""
    assert compute.hours(3.6e15, 1, 1.0, 0.5) == pytest.approx(2)
    assert compute.hours(3.6e15, 4, 1.0, 0.5) == pytest.approx(0.5)
