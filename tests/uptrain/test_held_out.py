"""Held-out text: the processes share it out, and their sums are the whole."""

from contextlib import nullcontext
from math import ceil

import pytest
import torch

from supra import testing
from supra.data.packing import block
from supra.evaluate import perplexity
from supra.uptrain.held_out import HeldOut

LENGTH = 7


class Processes:
    """Processes that evaluate one after the other; the last one has the sum of all."""

    def __init__(self, count):
        self.process_index, self.num_processes = 0, count
        self.device, self.sum = torch.device("cpu"), 0

    def reduce(self, x, reduction):
        assert reduction == "sum"
        self.sum = self.sum + x
        return self.sum


class Log:
    main = False

    def event(self, step, stage, values):
        self.values = values


def blocks(count):
    """Blocks with different numbers of predicted tokens."""
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randint(testing.VOCABULARY, (count, LENGTH), generator=drawn).tolist()
    return [block([row[: n % 4], row[n % 4 :]]) for n, row in enumerate(rows)]


@pytest.mark.parametrize(("count", "processes"), [(5, 1), (5, 2), (6, 3), (2, 4)])
def test_processes_share_the_blocks(count, processes):
    model = testing.untrained_model(testing.tiny_config(), "supra")
    passes, together, log = [], Processes(processes), Log()
    model.register_forward_pre_hook(lambda *_: passes.append(together.process_index))
    held = HeldOut(together, blocks(count), 2, log, nullcontext)
    for together.process_index in range(processes):
        found = held.report(3, "tune", {"eval": model})
    expected = perplexity(model, blocks(count))
    assert found == log.values
    assert found["eval_loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert found["eval_perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    of_each = ceil(ceil(count / processes) / 2)  # passes, of two rows
    assert passes[: processes * of_each] == [n for n in range(processes) for _ in range(of_each)]


def test_one_process_alone_evaluates_all_blocks():
    """Under FSDP, the first process calibrates the student while the others wait."""
    model, log = testing.untrained_model(testing.tiny_config(), "supra"), Log()
    held = HeldOut(Processes(2), blocks(5), 2, log, nullcontext)
    found = held.report(0, "start", {"converted": model}, alone=True)
    assert found["converted_loss"] == pytest.approx(perplexity(model, blocks(5)).loss, rel=1e-6)
