"""Counting bytes in the interpreter, on kernels whose bytes are known."""

import pytest
import torch
import triton
import triton.language as tl

from supra.bench import traffic
from supra.bench.operations import OPERATIONS
from supra.kernels import tiles


@triton.jit
def copy(x, y, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    i, j = tl.arange(0, 16), tl.arange(0, 64)
    tiles.store(y, WIDTH, i, ROWS, j, WIDTH, tiles.load(x, WIDTH, i, ROWS, j, WIDTH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_lanes_do_not_count(dtype):
    x = torch.ones(13, 48, dtype=dtype)
    y = torch.zeros_like(x)
    with traffic.counting() as counted:
        copy[(1,)](x, y, ROWS=13, WIDTH=48)
    assert torch.equal(x, y)
    assert counted.requested == 2 * x.numel() * x.element_size()
    assert counted.requested <= counted.distinct() <= counted.requested + 4 * traffic.SECTOR


def test_what_programs_share_is_distinct_once():
    x, y = torch.ones(16, 64), torch.zeros(16, 64)
    with traffic.counting() as counted:
        copy[(3,)](x, y, ROWS=16, WIDTH=64)
    assert counted.requested == 3 * 2 * x.numel() * 4
    assert counted.distinct() <= 2 * x.numel() * 4 + 4 * traffic.SECTOR


def test_torch_counts_what_it_reads_and_writes():
    x = torch.ones(4, 8)
    with traffic._TorchBytes() as counted:
        x.T[:2].unsqueeze(0)
        torch.empty(1000)
    assert counted.total == 0
    with traffic._TorchBytes() as counted:
        (x + 1).to(torch.bfloat16)
    assert counted.total == 128 + 128 + 128 + 64


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(traffic, "TOKENS", 128)


CASES = [(name, case) for name in OPERATIONS for case in OPERATIONS[name]]
# Heads of 32 channels have rows of 64 scores. kda moves the scores of queries, those of keys, T and
# the gradients of all three: 9.5 times the minimum in the backward pass.
MOST = {"kda": 10}


@pytest.mark.parametrize(("operation", "case"), [x for x in CASES if x[0] != "long_conv"])
def test_no_operation_moves_less_than_the_minimum(short, operation, case):
    rows = traffic.measure(traffic.Job(operation, case, 32, ("sm_90",)))
    parts = {row.part for row in rows}
    assert {"forward", "backward"} <= parts <= {"forward", "backward", "recurrent"}
    for row in rows:
        assert 0.99 <= row.ratio <= MOST.get(operation, 8), row
        assert row.distinct <= 1.02 * row.requested, row


@pytest.mark.parametrize(("case", "columns"), [("width 1", 1), ("packed", 1), ("width 8", 8)])
def test_bytes_that_a_token_adds_to_a_long_convolution(monkeypatch, case, columns):
    """The model's matrices are computed once, however long the text is. Wide heads store products
    of keys and values: each value takes as many columns as a key has channels."""
    moved = {}
    for tokens in (128, 384):
        monkeypatch.setattr(traffic, "TOKENS", tokens)
        for row in traffic.measure(traffic.Job("long_conv", case, 32, ("sm_90",))):
            if row.part == "recurrent":
                assert 0.99 <= row.ratio <= 6, row
            else:
                bytes_ = torch.tensor([row.ratio * row.minimum, row.minimum]) * tokens
                moved[row.part] = bytes_ - moved.get(row.part, 0)
    for part, (all_bytes, minimum) in moved.items():
        assert 2 < all_bytes / minimum <= 6.5 * columns, part


def test_targets_of_equal_tilings_are_one_row(short):
    rows = traffic.measure(traffic.Job("linear_attention", "plain", 32, ("sm_80", "sm_80")))
    assert all(row.targets == ["sm_80", "sm_80"] for row in rows)


def test_bytes_of_linear_attention(short):
    rows = traffic.measure(traffic.Job("linear_attention", "plain", 32, ("sm_80",)))
    minimum = {row.part: row.minimum for row in rows}
    state = 32 * 32 * 4
    assert minimum["forward"] == 4 * 32 * 2 + state / 128  # query, key, value, output, final state
    assert minimum["backward"] == (5 + 3) * 32 * 2  # and gradients
    assert minimum["recurrent"] == 4 * 32 * 2 + 2 * state


def test_products_of_linear_attention(short):
    """Three pairs of the two tiles of 64 tokens look at each other: scores, and their product with
    the values. Each token also updates the state, and reads it."""
    rows = traffic.measure(traffic.Job("linear_attention", "plain", 32, ("sm_90",)))
    (forward,) = (row for row in rows if row.part == "forward")
    pairs, states = 3 * 64 * 64 * (32 + 32), 2 * 128 * 32 * 32
    assert forward.products == 2 * (pairs + states) / 128
