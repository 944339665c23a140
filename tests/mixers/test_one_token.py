"""Steps of one token: how many operators they take, and when what they hold is made anew."""

import copy
import dataclasses
import pickle

import pytest
import torch

from supra.bench.decode import count_operators
from supra.mixers import MIXERS, AttentionShape, build_mixer, resolve_mixer
from supra.model.attention import attention_modules
from supra.testing import mixer_inputs, tiny_config, untrained_model

# Operators of a layer for one token in float32, as torch's profiler counts them; 193 in a layer of
# llama. Lower a bound when a mixer gets better; SmolLM2-135M at 6,500 a token has 214 a layer.
BOUNDS = {
    "softmax": 253, "supra": 327, "window": 737, "gated_delta": 393, "gated_deltanet": 211,
    "kda": 219, "mamba2": 190, "rwkv": 203, "h3": 494, "nonlinear_gated": 333, "retention": 279,
}  # fmt: skip
# The same in bfloat16; 205 in a layer of llama. Six are of torch.mv, which is faster there than mm.
BFLOAT16_BOUNDS = {"mamba2": 220, "rwkv": 233, "gated_deltanet": 249, "kda": 251}
WITH_STEP = ["mamba2", "rwkv", "gated_deltanet", "kda"]
SHAPE = AttentionShape(query_heads=6, key_heads=2, head_size=8, value_size=8, hidden_size=48)
PER_TOKEN = ("hidden_states", "query", "key", "value")


@torch.no_grad()
def operators(mixer, layers, dtype=torch.float32):
    model = untrained_model(tiny_config(num_hidden_layers=layers), mixer).eval().to(dtype)
    for module in attention_modules(model):
        module.mixer.float()
    cache = model(torch.arange(1, 17)[None], use_cache=True).past_key_values
    token = torch.tensor([[5]])

    def step():
        model(token, past_key_values=cache, use_cache=True)

    step()  # prepares
    return count_operators(step)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_layer_takes_no_more_operators_than_before(mixer):
    assert operators(mixer, 2) - operators(mixer, 1) <= BOUNDS[mixer]


@pytest.mark.parametrize("mixer", WITH_STEP)
def test_a_layer_takes_no_more_operators_than_before_in_bfloat16(mixer):
    one, two = (operators(mixer, layers, torch.bfloat16) for layers in (1, 2))
    assert two - one <= BFLOAT16_BOUNDS[mixer]


def build(name, seed=0):
    mixer = build_mixer(name, SHAPE, resolve_mixer(name)[1])
    mixer.reset_parameters()
    generator = torch.Generator().manual_seed(seed)
    for x in mixer.parameters():
        x.data += 0.1 * torch.randn(x.shape, generator=generator)
    return mixer


def inputs_of(dtype, tokens, seed=0):
    inputs = mixer_inputs(SHAPE, tokens, seed=seed)
    return dataclasses.replace(inputs, **{x: getattr(inputs, x).to(dtype) for x in PER_TOKEN})


def last_token(mixer, inputs):
    """The output at the last token, in a step."""
    count = inputs.query.shape[1] - 1
    _, state = mixer(inputs.first(count), return_state=True)
    rest = {name: getattr(inputs, name)[:, count:] for name in PER_TOKEN}
    output, _ = mixer(dataclasses.replace(inputs, **rest), state, return_state=True)
    return output[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_STEP)
def test_bfloat16_is_as_near_to_float64_as_without_a_step(name, monkeypatch):
    mixer, inputs = build(name), inputs_of(torch.bfloat16, 13)
    step = last_token(mixer, inputs)
    monkeypatch.setattr(type(mixer), "prepared_step", lambda self, dtype: None)
    plain = last_token(mixer, inputs)
    wide = {x: getattr(inputs, x).double() for x in PER_TOKEN}
    exact = last_token(mixer.double(), dataclasses.replace(inputs, **wide))
    assert step.dtype == plain.dtype == torch.bfloat16
    errors = [(x.double() - exact).norm() for x in (step, plain)]
    assert errors[0] <= 1.2 * errors[1] and errors[1] < 0.02 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_STEP)
@pytest.mark.parametrize("change", ["prompt", "to", "load"])
def test_a_step_sees_new_parameters(name, change):
    """After the next prompt, after the mixer moved, and after it was loaded."""
    mixer, other, inputs = build(name), build(name, seed=1), inputs_of(torch.float32, 9)
    before, expected = last_token(mixer, inputs), last_token(other, inputs)
    if change == "load":
        mixer.load_state_dict(other.state_dict())
    else:
        for x, y in zip(mixer.parameters(), other.parameters(), strict=True):
            x.data.copy_(y)
        if change == "to":
            mixer.to(torch.float64).to(torch.float32)
            assert mixer._prepared is None
    assert torch.equal(last_token(mixer, inputs), expected) and not torch.equal(before, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_STEP)
@pytest.mark.parametrize("change", ["in place", "replace", "load"])
def test_a_step_sees_new_parameters_between_two_tokens(name, change):
    """Also without a prompt between them; and in inference mode, whose tensors have no version."""
    mixer, other, inputs = build(name), build(name, seed=1), inputs_of(torch.bfloat16, 9)
    _, state = mixer(inputs.first(8), return_state=True)
    rest = {x: getattr(inputs, x)[:, 8:] for x in PER_TOKEN}
    token = dataclasses.replace(inputs, **rest)
    with torch.inference_mode():
        before = mixer(token, state)[0]
    step = mixer._prepared.step
    assert torch.equal(mixer(token, state)[0], before) and mixer._prepared.step is step
    if change == "load":
        mixer.load_state_dict(other.state_dict())
    for path, x in other.named_parameters() if change != "load" else ():
        part, _, field = path.rpartition(".")
        if change == "replace":
            setattr(mixer.get_submodule(part), field, torch.nn.Parameter(x.clone()))
        else:
            mixer.get_parameter(path).copy_(x)
    expected = other(token, state)[0]
    assert torch.equal(mixer(token, state)[0], expected) and not torch.equal(before, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_STEP)
def test_a_hook_on_a_part_is_called_in_a_step(name):
    mixer, inputs, calls = build(name), inputs_of(torch.float32, 9), []
    expected = last_token(mixer, inputs)
    mixer.output_gate.register_forward_hook(lambda *x: calls.append(x))
    torch.testing.assert_close(last_token(mixer, inputs), expected, atol=1e-6, rtol=1e-5)
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_STEP)
def test_copies_and_pickles_leave_a_step_behind(name):
    mixer, inputs = build(name), inputs_of(torch.float32, 9)
    expected = last_token(mixer, inputs)
    assert mixer._prepared is not None
    for copied in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert copied._prepared is None and torch.equal(last_token(copied, inputs), expected)


@pytest.mark.parametrize("name", WITH_STEP)
def test_with_gradients_no_step_runs(name):
    mixer, inputs = build(name), inputs_of(torch.float32, 9)
    last_token(mixer, inputs).sum().backward()
    assert mixer._prepared is None
    assert mixer.scale.grad.abs().sum() > 0
