"""Parameter groups and learning-rate schedules."""

from itertools import pairwise

import pytest

from supra.errors import UserError
from supra.uptrain.config import LoraConfig
from supra.uptrain.lora import add_lora
from supra.uptrain.optim import (
    begin_stage,
    build_optimizer,
    check_warmup,
    freeze_unused,
    require_gradients,
    schedule_factor,
    set_rates,
)
from supra.uptrain.stage_settings import AlignConfig, OptimizerConfig, ScheduleConfig, TuneConfig
from tests.conversion.test_calibrate import converted

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


@pytest.mark.parametrize(
    ("kind", "warmup", "most"),
    [("cosine", 99, 99), ("cosine", 100, 99), ("constant", 200, 99), ("wsd", 0.9, 80)],
)
def test_a_warm_up_leaves_room(kind, warmup, most):
    schedule = ScheduleConfig(kind=kind, warmup=warmup)
    if warmup <= most and warmup >= 1:
        check_warmup("tune", STEPS, schedule)
        assert max(factors(kind, warmup)) == 1
        return
    with pytest.raises(UserError, match=rf"tune.schedule.warmup .* leaves room for {most}"):
        check_warmup("tune", STEPS, schedule)


def student():
    """Two layers, the second one with softmax attention."""
    return converted("supra", layers=2, keep=[1])[1]


def rates(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["base_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


OPTIMIZER = OptimizerConfig(lr=1e-3, attention_lr=2e-3, new_lr=1e-2, weight_decay=0.1)


def test_rates_of_a_stage():
    model, stages = student(), {"align": AlignConfig(), "tune": TuneConfig()}
    optimizer = build_optimizer(model, stages)
    begin_stage(optimizer, "tune", OPTIMIZER)
    found = rates(model, optimizer)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["model.embed_tokens.weight"] == (1e-3, 0.1)
    assert found["model.norm.weight"] == (1e-3, 0.0)
    assert found["model.layers.0.self_attn.q_proj.weight"] == (2e-3, 0.1)
    assert found["model.layers.0.self_attn.mixer.scale"] == (1e-2, 0.0)
    begin_stage(optimizer, "align", OptimizerConfig(lr=1e-4, betas=(0.8, 0.9)))
    found = rates(model, optimizer)
    assert found["model.embed_tokens.weight"] == found["model.norm.weight"] == (0.0, 0.0)
    assert found["model.layers.0.self_attn.q_proj.weight"] == (1e-4, 0.0)
    assert found["model.layers.0.self_attn.mixer.scale"] == (1e-4, 0.0)
    set_rates(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0, 5e-5}
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_what_no_stage_trains_is_frozen():
    model = student()
    stages = {
        "align": AlignConfig(),
        "tune": TuneConfig(optimizer=OptimizerConfig(lr=0.0, new_lr=0.1)),
    }
    optimizer = build_optimizer(model, stages)
    freeze_unused(model, optimizer)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "self_attn" in name}
    require_gradients(optimizer, {"tune": stages["tune"]})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".mixer." in name}


def test_a_stage_that_trains_nothing_is_refused():
    """Adapters are not trained in align, and a student without new parameters has none to train."""
    teacher, _ = converted("supra", layers=1)
    new_alone = OptimizerConfig(lr=0.0, new_lr=1e-2)
    stages = {"align": AlignConfig(optimizer=new_alone), "tune": TuneConfig()}
    with pytest.raises(UserError, match="align trains nothing: no parameter of this student"):
        build_optimizer(add_lora(teacher, LoraConfig(rank=2, targets=("q_proj",))), stages)


def test_adapters_rest_while_layers_align():
    model = add_lora(student(), LoraConfig(rank=2))
    optimizer = build_optimizer(model, {"align": AlignConfig(), "tune": TuneConfig()})
    begin_stage(optimizer, "align", OPTIMIZER)
    found = rates(model, optimizer)
    assert {rate for name, (rate, _) in found.items() if "lora_" in name} == {0.0}
    assert {rate for name, (rate, _) in found.items() if "lora_" not in name} == {1e-2}
