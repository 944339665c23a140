"""A mixer with norms of its own gets queries and keys that are not normalised, and the teacher
inside the model keeps its QK-norm."""

import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from supra.conversion.calibrate import calibrate
from supra.conversion.convert import convert
from supra.mixers.gated_deltanet import GatedDeltaNet
from supra.model.attention import attention_modules
from supra.model.original import original
from supra.model.qk_norm import qk_norms
from supra.testing import tiny_checkpoint

TOKENS = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher whose norms have weights other than 1, and its student; layer 2 keeps attention."""
    folder = tmp_path_factory.mktemp("qk_norm")
    tiny_checkpoint(folder / "base", "qwen3", num_hidden_layers=3)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "base")
    for attention in attention_modules(teacher):
        for _, norm in qk_norms(attention):
            torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    teacher.save_pretrained(folder / "base")
    convert(folder / "base", folder / "rnn", mixer="gated_deltanet", keep_attention=[2])
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def test_only_the_weight_of_the_norm_acts(folders):
    seen, model = [], load(folders / "rnn")
    attentions = attention_modules(model)
    for attention in attentions:
        attention.mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TOKENS)
    for attention, inputs in zip(attentions, seen, strict=True):
        for name, found, heads in (("q", inputs.query, 6), ("k", inputs.key, 2)):
            norm = getattr(attention, f"{name}_norm")
            projected = getattr(attention, f"{name}_proj")(inputs.hidden_states)
            expected = norm.weight * projected.unflatten(-1, (heads, -1))
            if attention.mixer.name == "softmax":
                power = projected.unflatten(-1, (heads, -1)).square().mean(-1, keepdim=True)
                expected = expected * (power + norm.variance_epsilon).rsqrt()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_teacher_inside_is_the_teacher(folders):
    teacher, pairs = original(load(folders / "rnn"))
    expected = load(folders / "base").model(TOKENS).last_hidden_state
    torch.testing.assert_close(teacher(TOKENS).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert len(pairs) == 2


@torch.no_grad()
def test_calibration_reads_what_the_mixer_reads(folders, monkeypatch):
    """Its targets are what the teacher's attention makes of normalised queries and keys."""
    calls, targets, model = [], [], load(folders / "rnn")
    monkeypatch.setattr(GatedDeltaNet, "calibrate", lambda _, *call: calls.append(call))
    calibrate(model, TOKENS, torch.arange(TOKENS.shape[1]).expand(TOKENS.shape))
    teacher, pairs = original(model)
    for _, other in pairs:
        other.mixer.register_forward_hook(lambda *call: targets.append(call[-1][0]))
    teacher(TOKENS)
    for (attention, _), (inputs, target), expected in zip(pairs, calls, targets, strict=True):
        torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-5)
        projected = attention.q_proj(inputs.hidden_states).unflatten(-1, (6, -1))
        expected = attention.q_norm.weight * projected
        torch.testing.assert_close(inputs.query, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoding_saving_and_pickling_change_nothing(folders, tmp_path):
    model = load(folders / "rnn")
    expected = model(TOKENS).logits
    cache, found = None, []
    for piece in TOKENS.split([25, *[1] * 15], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    for other in (load(tmp_path / "saved"), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS).logits, expected)


def test_the_report_says_which_norms_do_no_more_than_multiply(folders):
    report = (folders / "rnn" / "conversion.json").read_text()
    assert report.count("without its norm: gated_deltanet has its own") == 4
