"""Exported models compute the same as the model, with torch's own operators and in ONNX."""

import pytest
import torch
from torch.export import Dim
from transformers import GenerationConfig
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from supra.errors import UserError
from supra.export import DecodingStep
from supra.mixers import MIXERS, PRESETS
from supra.mixers.state_policy import StatePolicy
from supra.model.attention import attention_modules
from supra.testing import tiny_config, untrained_model

BATCH, TOKENS = Dim("batch"), Dim("tokens")
# options that change a mixer's step
FORMS = {
    **{name: (name, {}) for name in MIXERS},
    "token_shift": ("rwkv", {"token_shift": True}),
    "silu": ("mamba2", {"activation": "silu", "normalize": "rms"}),
    "wide": ("h3", {"head_size": 8}),
    **{name: (name, {}) for name in PRESETS},
}


def random_model(form, family="llama", layers=1):
    name, options = FORMS[form]
    config = tiny_config(family, num_hidden_layers=layers)
    model = untrained_model(config, name, options).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_tokens(rows, count):
    return torch.randint(1, 300, (rows, count))


def positions(rows, begin, end):
    return torch.arange(begin, end).expand(rows, -1)


def prompt_states(model, tokens):
    cache = model(tokens, use_cache=True).past_key_values
    return [x for layer in cache.layers for x in layer.state if x is not None]


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def exported_step(model):
    """A step exported with a dynamic number of rows, and a dynamic length of states that grow."""
    step = DecodingStep(model)
    states = prompt_states(model, random_tokens(2, 3))
    layers = [int(name.split(".")[0]) for name in step.state_names]
    grows = [name == "softmax" for name in model.config.supra["layers"]]
    shapes = tuple({0: BATCH} | ({1: Dim("kept")} if grows[n] else {}) for n in layers)
    inputs = random_tokens(2, 1), positions(2, 3, 4), *states
    return torch.export.export(step, inputs, dynamic_shapes=({0: BATCH}, {0: BATCH}, shapes))


def exported_model(model, masked):
    """The model exported for whole texts, with a dynamic number of rows and tokens."""
    tokens = random_tokens(2, 13)
    names = ["input_ids", *(["attention_mask", "position_ids"] if masked else [])]
    inputs = dict(zip(names, (tokens, torch.ones_like(tokens), positions(2, 0, 13)), strict=False))
    shapes = {name: {0: BATCH, 1: TOKENS} for name in names} | {"use_cache": None}
    inputs["use_cache"] = False
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes)


def texts(masked):
    """Three rows, padded on the left or on the right."""
    tokens = random_tokens(3, 29)
    mask = torch.ones_like(tokens)
    if not masked:
        return {"input_ids": tokens}, mask.bool()
    mask[0, :11], mask[1, 25:] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": places}
    return inputs, mask.bool()


def close(found, expected, tolerance):
    assert expected.abs().max() > 1, "the logits are too small to tell a wrong model from a right"
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_an_exported_step_decodes_as_the_model(mixer):
    model = random_model(mixer)
    program = exported_step(model)
    assert not any("supra" in name for name in operators(program))
    tokens = random_tokens(3, 28)
    expected, step = model(tokens, use_cache=False).logits, program.module()
    states = prompt_states(model, tokens[:, :20])
    for at in range(20, 28):
        logits, *states = step(tokens[:, at : at + 1], positions(3, at, at + 1), *states)
        close(logits[:, 0], expected[:, at], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mixer", FORMS)
def test_a_step_begins_with_nothing(mixer):
    """Starting from `start` equals starting without a cache; a prompt equals its single steps."""
    model = random_model(mixer, layers=2)
    step, tokens = DecodingStep(model), random_tokens(2, 9)
    logits, *states = step(tokens, positions(2, 0, 9), *step.start(2))
    close(logits, model(tokens, use_cache=False).logits, 1e-5)
    for state, expected in zip(states, prompt_states(model, tokens), strict=True):
        torch.testing.assert_close(state, expected)


@torch.no_grad()
def test_an_exported_model_reads_padded_texts():
    model = random_model("mamba2")
    program = exported_model(model, masked=True)
    assert not any("supra" in name for name in operators(program))
    inputs, kept = texts(masked=True)
    found = program.module()(**inputs, use_cache=False).logits
    close(found[kept], model(**inputs, use_cache=False).logits[kept], 1e-5)


def run_onnx(program, inputs):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime, of the extra dev")
    pytest.importorskip("onnxscript", reason="onnxscript, of the extra dev")
    converted = torch.onnx.export(program, dynamo=True, verbose=False)
    session = runtime.InferenceSession(converted.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, feeds)]


@torch.no_grad()
def check_onnx(model):
    """Whole texts, with and without padding, and a step after a prompt, with its states."""
    for masked in (False, True):
        inputs, kept = texts(masked)
        logits, *_ = run_onnx(exported_model(model, masked), inputs.values())
        close(logits[kept], model(**inputs, use_cache=False).logits[kept], 1e-4)
    check_onnx_step(model)


@torch.no_grad()
def check_onnx_step(model):
    tokens = random_tokens(3, 21)
    inputs = tokens[:, 20:], positions(3, 20, 21), *prompt_states(model, tokens[:, :20])
    logits, *states = run_onnx(exported_step(model), inputs)
    close(logits[:, 0], model(tokens, use_cache=False).logits[:, 20], 1e-4)
    for state, expected in zip(states, prompt_states(model, tokens), strict=True):
        torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)


def test_onnx_decodes():
    check_onnx_step(random_model("supra"))


@pytest.mark.long  # a minute a form: ONNX is written operator by operator
@pytest.mark.parametrize("form", FORMS)
def test_onnx_is_the_model(form):
    check_onnx(random_model(form))


@pytest.mark.long  # as above
@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_onnx_of_other_families(family):
    model = random_model("window", family)
    if family == "gpt_oss":  # ONNX has no operator for grouped products of experts
        model.set_experts_implementation("batched_mm")
    check_onnx(model)


@torch.no_grad()
def test_what_cannot_be_exported_says_so():
    model = random_model("supra")
    tokens = random_tokens(1, 9)
    packed = {"use_cache": False, "cu_seq_lens_q": torch.tensor([0, 4, 9])}
    with pytest.raises(UserError, match="packed rows cannot be exported: give one doc"):
        torch.export.export(model, (tokens,), packed)
    settings = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        max_length=16,
        cache_config={"batch_size": 1, "max_cache_len": 16},
    )
    model.generation_config = settings
    wrapper = TorchExportableModuleWithStaticCache(model)
    with pytest.raises(UserError, match=r"StaticCache.* export supra.export.DecodingStep"):
        torch.export.export(wrapper, (tokens[:, :1], None, torch.tensor([0])))
    attention_modules(model)[0].mixer.set_policy(StatePolicy(norm=1.0), 0)
    with pytest.raises(UserError, match=r"norm \(=1.0\) of the state_policy cannot be exported"):
        torch.export.export(model, (tokens,), {"use_cache": False})
