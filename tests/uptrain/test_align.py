"""Layer by layer: targets are the teacher's own, gradients the formula's, and errors go down."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from supra.errors import UserError
from supra.model.attention import attention_modules
from supra.model.original import original
from supra.uptrain import align
from supra.uptrain.align import LayerByLayer, relative_error
from supra.uptrain.stage_settings import AlignConfig, OptimizerConfig, OrientConfig
from tests.conversion.test_calibrate import converted

KEEP = [1]
FREE = OptimizerConfig(clip=0.0)


def batch(rows=2, tokens=24, seed=0):
    """Rows with two documents each."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([torch.arange(9), torch.arange(tokens - 9)])
    return {
        "input_ids": torch.randint(300, (rows, tokens), generator=generator),
        "position_ids": positions.expand(rows, -1),
    }


def objective(student, stage, autocast=nullcontext):
    layers = original(student, own_attention=True)
    return LayerByLayer(Accelerator(cpu=True), *layers, stage, autocast)


def observed(model, inputs):
    """The arguments and the output of every attention module's call."""
    seen = []
    hooks = [
        attention.register_forward_hook(
            lambda _, args, kwargs, output: seen.append((args, kwargs, output[0])),
            with_kwargs=True,
        )
        for attention in attention_modules(model)
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def output_of(attention, target, args, kwargs):
    """The output after the output projection, or before it."""
    read = []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    hidden, _ = attention(*args, **kwargs)
    hook.remove()
    return hidden if target == "hidden" else read[0]


def test_the_teacher_in_the_student_is_the_teacher():
    """The teacher stays the original also after training, and packs documents like the student."""
    teacher, student = converted("supra", keep=KEEP)
    within, pairs = original(student, own_attention=True)
    assert [own.layer_idx for own, _ in pairs] == [0, 2]
    with torch.no_grad():
        for own, _ in pairs:
            for parameter in own.parameters():
                parameter.add_(0.1)
    expected, found = observed(teacher, batch()), observed(within, batch())
    for (_, _, target), (_, _, output) in zip(expected, found, strict=True):
        torch.testing.assert_close(output, target, atol=1e-6, rtol=1e-5)


def test_only_attention_is_copied():
    _, student = converted("supra", keep=KEEP)
    within, _ = original(student, own_attention=True)
    own, shared = dict(student.base_model.named_parameters()), dict(within.named_parameters())
    copied = {name for name, x in shared.items() if x is not own[name]}
    names = {f"layers.{layer}.self_attn.{x}_proj.weight" for layer in (0, 2) for x in "qkvo"}
    assert copied == names and all(torch.equal(own[name], shared[name]) for name in names)


@pytest.mark.parametrize("target", ["hidden", "output"])
def test_the_gradient_is_that_of_the_formula(target):
    _, student = converted("supra", keep=KEEP)
    layers = objective(student, AlignConfig(target=target, optimizer=FREE))
    batches = [batch(seed=1), batch(seed=2)]
    with torch.no_grad():  # so that the inherited weights are not the teacher's any more
        for own, _ in layers.pairs:
            own.q_proj.weight.mul_(1.1)
    values = layers.add_gradients(batches)
    names = [name for name, x in student.named_parameters() if x.grad is not None]
    gradients = [x.grad.clone() for x in student.parameters() if x.grad is not None]
    student.zero_grad()

    errors = []
    for one in batches:
        seen = observed(layers.teacher, one)
        for own, teacher in layers.pairs:
            args, kwargs, _ = seen[own.layer_idx]
            ours, theirs = (output_of(x, target, args, kwargs) for x in (own, teacher))
            errors.append(((ours - theirs.detach()) ** 2).sum() / (theirs.detach() ** 2).sum())
    (sum(errors) / 2).backward()
    expected = [x.grad for x in student.parameters() if x.grad is not None]
    for name, gradient, other in zip(names, gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-4, msg=name)
    trained = {name.split(".self_attn.")[-1].split(".")[0] for name in names}
    expected_names = {"q_proj", "k_proj", "v_proj", "o_proj", "mixer"}
    assert trained == expected_names - ({"o_proj"} if target == "output" else set())
    assert values["loss"] == pytest.approx(sum(errors).item() / 4, rel=1e-6)
    assert values["worst_layer"] == pytest.approx(
        max((errors[i] + errors[i + 2]).item() / 2 for i in (0, 1)), rel=1e-6
    )
    norm = torch.nn.utils.get_total_norm(expected).item()
    assert values["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "left"),
    [
        (AlignConfig(), 0.8),
        (AlignConfig(target="output"), 0.8),
        (OrientConfig(), 0.95),
        (OrientConfig(loss="cross_entropy"), 0.95),
    ],
    ids=["hidden", "output", "orient", "cross_entropy"],
)
def test_every_layer_learns(stage, left):
    entropy = getattr(stage, "loss", None) == "cross_entropy"
    _, student = converted("hedgehog" if entropy else "supra", keep=KEEP)
    layers = objective(student, stage)
    parameters = [x for own, _ in layers.pairs for x in own.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    before = layers.errors(batch(), 0.0)
    for _ in range(20):
        optimizer.zero_grad()
        layers.add_gradients([batch()])
        optimizer.step()
    assert (layers.errors(batch(), 0.0) < left * before).all()


def test_the_teachers_matrix_is_its_attention(monkeypatch):
    teacher, student = converted("supra", layers=1)
    layers = objective(student, OrientConfig())
    matrices = []
    original_matrix = align.matrix_error

    def spy(matrix, target):
        matrices.append(target)
        return original_matrix(matrix, target)

    monkeypatch.setattr(align, "matrix_error", spy)
    one = batch(rows=1, tokens=12)
    one["position_ids"] = torch.arange(12)[None]
    layers.errors(one, 0.0)
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        seen = teacher(**one, use_cache=False, output_attentions=True).attentions
    torch.testing.assert_close(matrices[0], seen[0], atol=1e-6, rtol=1e-5)


def test_the_cross_entropy_is_hedgehogs():
    """−Σⱼ aᵢⱼ log bᵢⱼ (equation 6 of the paper) has this gradient, and this value up to the
    target's entropy."""
    logits = torch.randn(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    later = torch.ones(7, 7).triu(1).bool()
    target = torch.randn(2, 3, 7, 7).double().masked_fill(later, -torch.inf).softmax(-1)
    weights = logits.exp().masked_fill(later, 0)
    matrix = weights / weights.sum(-1, keepdim=True)
    expected = entropy = 0
    for row in range(7):
        seen = slice(0, row + 1)
        own, teachers = matrix[..., row, seen], target[..., row, seen]
        expected = expected - (teachers * own.log()).sum(-1).mean() / 7
        entropy = entropy - (teachers * teachers.log()).sum(-1).mean() / 7
    found = align.row_divergence(matrix, target)
    torch.testing.assert_close(found, expected - entropy, atol=1e-12, rtol=1e-12)
    gradients = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, expected))
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-10)
    assert abs(align.row_divergence(target, target).item()) < 1e-12
    assert align.row_divergence(torch.zeros_like(target), target).isfinite()


def test_a_cross_entropy_needs_weights_that_sum_to_one():
    _, student = converted("supra", layers=1)
    with pytest.raises(UserError, match="those of supra need not: convert with hedgehog"):
        objective(student, OrientConfig(loss="cross_entropy"))


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_each_layer_is_clipped_by_itself(clip):
    _, student = converted("supra", keep=KEEP)
    layers = objective(student, AlignConfig(optimizer=OptimizerConfig(clip=clip)))
    values = layers.add_gradients([batch()])
    norms = [
        torch.nn.utils.get_total_norm([x.grad for x in own.parameters()]).item()
        for own, _ in layers.pairs
    ]
    if clip:
        assert norms == [pytest.approx(clip, rel=1e-3)] * 2 and values["grad_norm"] > 0.1
    else:
        assert math.hypot(*norms) == pytest.approx(values["grad_norm"], rel=1e-6)


def test_bf16_computes_and_float32_learns():
    gradients, errors = [], []
    for enabled in (False, True):
        _, student = converted("supra", keep=KEEP)
        autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=enabled)
        layers = objective(student, AlignConfig(optimizer=FREE), autocast)
        errors.append(layers.add_gradients([batch()])["loss"])
        layers.add_gradients([batch(seed=3)])
        gradients.append({k: x.grad for k, x in student.named_parameters() if x.grad is not None})
    assert errors[0] != errors[1] and errors[1] == pytest.approx(errors[0], rel=0.02)
    assert gradients[0].keys() == gradients[1].keys()
    for name, exact in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert relative_error(gradients[1][name], exact) < 0.01, name


def test_zeros_have_an_error_of_one():
    target = torch.randn(3, 4)
    assert relative_error(torch.zeros(3, 4), target) == 1.0
    assert relative_error(target, target) == 0.0


def test_a_model_without_mixers_is_refused():
    teacher, _ = converted("supra", layers=1)
    with pytest.raises(UserError, match="the model has no mixers: run `supra convert`"):
        original(teacher)
