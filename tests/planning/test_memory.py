"""The arithmetic of memory, each part by hand."""

from dataclasses import replace

import pytest

from supra.planning import memory
from supra.planning.activations import Kept
from supra.planning.hardware import Gpus, Hardware
from supra.planning.memory import Pass, Sizes

KEPT = Kept(
    layers=[{"mixer": 70, "norms": 30}, {"mixer": 50, "norms": 30}],
    layer_input=10,
    outside=5,
    fixed=400,
)
SIZES = Sizes(
    all=1001,
    blocks=600,
    block=300,
    stepped=701,
    trained=801,
    trained_block=250,
    trained_head=200,
    frozen_products=0,
    bucketed=801,
    head=200,
    vocabulary=50,
    heads=3,
    kept=KEPT,
    teacher=1000,
    teacher_blocks=801,
)
RUN = Pass(
    rows=4, length=8, width=2, hardware=Hardware(Gpus(8, 80)), accumulates=False,
    checkpointing=False, learns_from="teacher",
)  # fmt: skip


def test_weights_gradients_and_moments_are_float32():
    assert memory.weights(1001, 1) == 4004
    assert memory.weights(1001, 8) == 4 * 126  # the last process has the rest
    assert memory.optimizer(1001, 1) == 8008  # AdamW: two moments of 4 bytes


def test_activations_grow_with_rows():
    assert memory.activations(KEPT, 4, checkpointing=False) == 4 * (100 + 80 + 5)
    # two inputs, what is between blocks, and the largest block
    assert memory.activations(KEPT, 4, checkpointing=True) == 4 * (2 * 10 + 5 + 100)


def test_logits_of_a_chunk():
    """Two tensors of 2 bytes and four of 4; the teacher adds one of 2 and two of 4."""
    text = replace(RUN, learns_from="text")
    assert memory.logits(text, 50) == 32 * 50 * (2 * 2 + 4 * 4)
    assert memory.logits(RUN, 50) == 32 * 50 * (3 * 2 + 6 * 4)
    assert memory.logits(replace(RUN, learns_from="top_k"), 50) == 32 * 50 * (2 * 2 + 6 * 4)
    # 2**26 logits at a time: 2048 tokens of a vocabulary of 32768
    long = replace(text, length=100_000)
    assert memory.logits(long, 2**15) == 2**26 * 20
    assert memory.logits(replace(long, device="cpu"), 2**15) == 2**26 * 4 + 2**20 * 16


def test_the_head_may_need_more_than_the_logits():
    """Its gradient so far, a chunk's, and that of its copy, beside logits of 2 bytes."""
    assert memory.head_gradients(200, 2) == 200 * (4 + 4 + 2)
    assert memory.head_gradients(200, 4) == 200 * (4 + 4)
    assert memory.scoring(SIZES, RUN) == memory.logits(RUN, 50)
    large = replace(SIZES, trained_head=10_000)
    assert memory.scoring(large, RUN) == 32 * 50 * 3 * 2 + 100_000
    # the gradient of the chunks before
    many = replace(RUN, length=10**6)
    assert memory.scoring(SIZES, many) == memory.logits(many, 50) + 4 * 200


def test_rows_on_several_processes():
    """Keys, values and a mask of the other parts, in layers that keep softmax attention."""
    shared = replace(RUN, length=8, row=32)
    assert memory.of_other_parts(SIZES, shared) == 0
    hybrid = replace(SIZES, softmax_layers=2, key_values=2 * 6)
    assert memory.of_other_parts(hybrid, shared) == 4 * (2 * 12 * 24 + 2 * 8 * 32)
    assert memory.of_other_parts(hybrid, RUN) == 0


def test_copies_of_weights():
    frozen = replace(SIZES, frozen_products=150, block=100)
    again = replace(RUN, checkpointing=True)
    assert memory.weight_copies(frozen, RUN) == 400 + 2 * 200
    assert memory.weight_copies(frozen, again) == 400 - 2 * 50 + 2 * 200
    assert memory.weight_copies(frozen, replace(again, width=4)) == 400
    assert memory.layer_copies(replace(SIZES, copied=90), RUN) == 2 * (90 + 90)
    assert memory.layer_copies(replace(SIZES, copied=90, trained=40), RUN) == 2 * (90 + 40)


def test_copies_of_weights_under_fsdp():
    fsdp = replace(RUN, hardware=Hardware(Gpus(8, 80), 1, "fsdp"))
    assert memory.weight_copies(SIZES, fsdp) == 400 + 2 * 200
    assert memory.weight_copies(SIZES, replace(fsdp, checkpointing=True)) == 2 * 300 + 2 * 200
    assert memory.layer_copies(replace(SIZES, copied=900), fsdp) == 2 * 300


def test_what_fsdp_gathers():
    """401 parameters outside the blocks, two blocks, and the gradients of one or two."""
    assert memory.outside_of_blocks(SIZES) == (4 * 401, 4 * 401)
    assert memory.gathered(SIZES, RUN) == 4 * (401 + 600) + 4 * 250
    assert memory.gathered(SIZES, replace(RUN, checkpointing=True)) == 4 * (401 + 600) + 4 * 500


STANDING = 4 * 1001 + 8 * 701 + 2 * 1000 + 4 * 801


def test_ddp():
    found = memory.end_to_end(SIZES, RUN)
    assert found.parts["buckets of DDP"] == 4 * 801
    scoring = 32 * 50 * 30
    assert found.peak == STANDING + 800 + 4 * 185 + scoring  # gradients come later
    accumulating = memory.end_to_end(SIZES, replace(RUN, accumulates=True))
    assert accumulating.peak == found.peak + 4 * 801


def test_the_peak_may_be_in_a_block():
    """Logits are gone, the head's gradient is there, and a block makes its gradients."""
    few, short = (
        replace(SIZES, vocabulary=1, trained_head=20),
        replace(RUN, length=1, accumulates=True),
    )
    assert memory.end_to_end(few, short).peak == STANDING + 4 * 801 + 800 + 4 * 185 + 4 * 70
    fsdp = replace(short, hardware=Hardware(Gpus(8, 80), 1, "fsdp"))
    standing = 4 * (126 + 101) + 8 * 88 + 2 * (199 + 101)
    block = 4 * (401 + 600) + 4 * (20 + 250) + 4 * 70
    assert memory.end_to_end(few, fsdp).peak == standing + 800 + 4 * 185 + block


def test_gradients_can_be_the_peak():
    small = replace(RUN, rows=1, length=1, learns_from="text")
    sizes = replace(SIZES, stepped=9_000, trained=10_000, trained_head=0, bucketed=0)
    found = memory.end_to_end(sizes, small)
    standing = 4 * 1001 + 8 * 9_000 + 2 * 1000
    assert found.peak == standing + 4 * 10_000 + 70  # the last block's backward pass


def test_checkpointing_computes_a_block_again_in_the_backward_pass():
    """While losses are computed, its activations are not there."""
    found = memory.end_to_end(SIZES, replace(RUN, checkpointing=True))
    assert found.parts["activations"] == 4 * (2 * 10 + 5 + 100)
    assert found.peak == STANDING + 800 + 4 * (2 * 10 + 5) + 32 * 50 * 30


def test_fsdp_has_a_part_of_the_student_and_of_the_teachers_blocks():
    found = memory.end_to_end(SIZES, replace(RUN, hardware=Hardware(Gpus(8, 80), 1, "fsdp"))).parts
    assert found["weights"] == 4 * 126 and found["gradients"] == 4 * 101
    assert found["optimizer"] == 8 * 88
    assert found["teacher"] == 2 * (199 + 101)  # what is outside the blocks, and a part of them
    assert found["copies of weights"] == 800 and found["buckets of DDP"] == 0


def test_machines_under_hsdp_have_a_copy_each():
    """Its parts are as large as under FSDP on one machine."""
    one, many = (
        memory.end_to_end(SIZES, replace(RUN, hardware=hardware))
        for hardware in (Hardware(Gpus(3, 80), 1, "fsdp"), Hardware(Gpus(3, 80), 5, "hsdp"))
    )
    assert one == many


@pytest.mark.parametrize(
    ("learns_from", "matrices"), [("outputs", 0), ("matrices", 8 * 4 * 3 * 64)]
)
def test_layer_by_layer(learns_from, matrices):
    sizes = replace(SIZES, stepped=300, trained=300, copied=90)
    alone = Hardware(Gpus(1, 80), 1, "one_gpu")
    found = memory.layer_by_layer(sizes, replace(RUN, hardware=alone, learns_from=learns_from))
    assert found.parts["attention matrices"] == matrices
    assert found.parts["teacher's attention"] == 4 * 90
    assert found.peak == 4004 + 2400 + 360 + 1200 + 360 + 2 * 4 * 100 + matrices


def test_layer_by_layer_in_parts():
    """401 parameters outside the blocks, a block in two places, and a module with gradients."""
    sizes = replace(SIZES, stepped=300, trained=300, copied=90)
    run = replace(RUN, hardware=Hardware(Gpus(8, 80), 1, "fsdp"), learns_from="outputs")
    found = memory.layer_by_layer(sizes, run).parts
    assert found["weights"] == 4 * 126 and found["optimizer"] == 8 * 38
    assert found["gradients"] == 4 * 38 and found["teacher's attention"] == 4 * 12
    assert found["gathered by FSDP"] == 4 * (401 + 600) + 4 * (250 + 250)
