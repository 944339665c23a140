"""Parameter groups and learning-rate schedules."""

from itertools import pairwise

import pytest
import torch

from supra.uptrain.config import OptimizerConfig, ScheduleConfig
from supra.uptrain.optim import build_optimizer, freeze_unused, schedule_factor, set_rates

STEPS = 100


def factors(kind, warmup, min_ratio=0.1):
    config = ScheduleConfig(kind=kind, warmup=warmup, min_ratio=min_ratio)
    return [schedule_factor(step, STEPS, config) for step in range(STEPS)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 10, 0.1])
def test_shapes(kind, warmup):
    values = factors(kind, warmup)
    rise = 10 if warmup else 0
    assert values[rise] == pytest.approx(1.0)
    assert all(0 < a < b for a, b in pairwise(values[: rise + 1]))
    assert all(a >= b for a, b in pairwise(values[rise:]))
    assert values[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_cosine_is_half_way_in_the_middle():
    assert factors("cosine", 0, min_ratio=0.0)[49:51] == pytest.approx([0.5, 0.5], abs=0.01)


def test_wsd_is_stable_for_four_fifths():
    values = factors("wsd", 10)
    assert set(values[10:80]) == {1.0} and values[81] < 1


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_one_step(kind):
    assert 0 < schedule_factor(0, 1, ScheduleConfig(kind=kind, warmup=0)) <= 1


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(3, 3)
        self.attention = torch.nn.Module()
        self.attention.mixer = torch.nn.Linear(3, 3)


def test_groups():
    config = OptimizerConfig(lr=1e-3, new_lr=1e-2, weight_decay=0.1)
    model = Model()
    optimizer = build_optimizer(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {
        "proj.weight": (1e-3, 0.1),
        "proj.bias": (1e-3, 0.0),
        "attention.mixer.weight": (1e-2, 0.0),
        "attention.mixer.bias": (1e-2, 0.0),
    }
    set_rates(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 5e-3}


def test_a_rate_of_zero_freezes():
    model, config = Model(), OptimizerConfig(lr=0.0, new_lr=1e-2)
    freeze_unused(model, config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["attention.mixer.weight", "attention.mixer.bias"]
    assert len(build_optimizer(model, config).param_groups) == 1
