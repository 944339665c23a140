"""Calibration moves each mixer towards the teacher's attention, and touches nothing else."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from supra import testing
from supra.conversion.calibrate import calibrate
from supra.errors import UserError
from supra.mixers import resolve_mixer
from supra.model.attention import attention_modules
from supra.model.auto import converted_config
from supra.testing import tiny_config


def converted(mixer, layers=3, keep=(), options=None):
    """A random teacher, and a student with its weights and that mixer."""
    config = tiny_config("llama", num_hidden_layers=layers)
    name, options = resolve_mixer(mixer, options)
    names = ["softmax" if layer in keep else name for layer in range(layers)]
    torch.manual_seed(4)
    student = AutoModelForCausalLM.from_config(converted_config(config, names, {name: options}))
    teacher = AutoModelForCausalLM.from_config(config)
    teacher.load_state_dict({k: v for k, v in student.state_dict().items() if ".mixer." not in k})
    return teacher.eval(), student.eval()


@pytest.fixture
def batch():
    tokens = torch.randint(300, (4, 80))
    return tokens, torch.arange(80).expand(4, -1)


def errors(teacher, student, tokens):
    """Per layer: |student's attention − teacher's|² / |teacher's|², on the teacher's inputs."""
    seen = []
    hooks = [
        attention.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
        )
        for attention in attention_modules(teacher)
    ]
    found = []
    with torch.no_grad():
        teacher(tokens, use_cache=False)
        for (kwargs, target), attention in zip(seen, attention_modules(student), strict=True):
            output, _ = attention(**kwargs | {"attention_mask": None})
            found.append(((output - target).pow(2).sum() / target.pow(2).sum()).item())
    for hook in hooks:
        hook.remove()
    return found


def test_every_layer_comes_closer_to_its_teacher(batch):
    teacher, student = converted("supra")
    before = errors(teacher, student, batch[0])
    calibrate(student, *batch)
    after = errors(teacher, student, batch[0])
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True))
    assert max(after) < 1, "zeros would be closer to the teacher"


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2"])
def test_autocast_keeps_no_weight_that_changes(mixer, batch):
    """Gates without a bias are closed until calibration opens them."""
    options = {"form": "granite"} if mixer == "mamba2" else {}
    found = {}
    for enabled in (False, True):
        teacher, student = converted(mixer, layers=1, options=options)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            calibrate(student, *batch)
        found[enabled] = errors(teacher, student, batch[0])
    for exact, rounded in zip(found[False], found[True], strict=True):
        assert rounded < 1.1 * exact + 0.01


def test_scale_is_the_least_squares_solution(batch):
    """On the text that it was fitted to, no other scale has a smaller error."""
    _, student = converted("supra", layers=1)
    mixer = attention_modules(student)[0].mixer
    seen = {}
    original = type(mixer).calibrate

    def spy(self, inputs, target):
        seen.update(inputs=inputs, target=target)
        original(self, inputs, target)

    type(mixer).calibrate = spy
    try:
        calibrate(student, *batch)
    finally:
        type(mixer).calibrate = original

    def error():
        return (mixer(seen["inputs"])[0] - seen["target"]).pow(2).sum()

    with torch.no_grad():
        best = error()
        for factor in (0.9, 1.1):
            mixer.scale *= factor
            assert error() > best
            mixer.scale /= factor
        slopes = mixer.log_slope.clone()
        mixer.log_slope += 1.0
        assert error() > best
        mixer.log_slope.copy_(slopes)
        torch.testing.assert_close(error(), best)


def test_scales_are_of_order_one(batch):
    """One learning rate serves all parameters only if they are of similar size."""
    _, student = converted("supra")
    calibrate(student, *batch)
    for attention in attention_modules(student):
        size = attention.mixer.scale.square().mean(1).sqrt()
        torch.testing.assert_close(size, torch.ones_like(size))


def test_nothing_else_changes(batch):
    _, student = converted("supra", keep=[1])
    before = {name: x.clone() for name, x in student.state_dict().items()}
    mixers = [attention.mixer for attention in attention_modules(student)]
    student.train()
    calibrate(student, *batch)
    assert student.training
    assert [attention.mixer for attention in attention_modules(student)] == mixers
    changed = {k for k, x in student.state_dict().items() if not torch.equal(x, before[k])}
    assert {name.split(".mixer.")[-1] for name in changed} == {"scale", "magnitude", "log_slope"}
    assert not any("layers.1." in name for name in changed)


def test_the_paper_form_has_nothing_to_choose(batch):
    _, student = converted("supra_paper")
    before = {name: x.clone() for name, x in student.state_dict().items()}
    calibrate(student, *batch)
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())


def test_a_model_that_was_not_converted_is_refused(batch):
    teacher, _ = converted("supra", layers=1)
    with pytest.raises(UserError, match="the model has no mixers: run"):
        calibrate(teacher, *batch)


def test_a_family_without_linear_projections_has_none_to_fit():
    model = testing.untrained_model(testing.tiny_config("gpt2"), "gated")
    batch = torch.zeros(4, 8, dtype=torch.int64), torch.arange(8).expand(4, -1)
    with pytest.raises(UserError, match="gpt2 has no linear output projection"):
        calibrate(model, *batch, projections=True)


@pytest.mark.parametrize("mixer", ["hedgehog", "gated", "gated_delta"])
def test_projections_come_closer_still(mixer):
    """Fitting the projections reduces the error further, and no layer's error grows."""
    teacher, student = converted(mixer)
    batch = torch.randint(300, (16, 80)), torch.arange(80).expand(16, -1)
    calibrate(student, *batch)
    before = errors(teacher, student, batch[0])
    _, student = converted(mixer)
    calibrate(student, *batch, projections=True)
    after = errors(teacher, student, batch[0])
    assert all(new < 1.0001 * old for new, old in zip(after, before, strict=True))
    assert min(new / old for new, old in zip(after, before, strict=True)) < 0.98
    kept = dict(teacher.named_parameters())
    moved = {
        name.split(".")[-2]
        for name, x in student.named_parameters()
        if ".mixer." not in name and not torch.equal(x, kept[name])
    }
    assert moved == {"o_proj"}
