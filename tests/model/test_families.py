"""Every family that converts, as a tiny random model, through the command's own function.

Under the `softmax` mixer it computes what it did before, so the swap loses nothing; under `supra`
it is a recurrent network whose state, padding and checkpoint are right.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from supra.conversion.convert import convert
from supra.model.families import FAMILIES
from supra.model.modeling import family_classes
from supra.testing import tiny_checkpoint

TOKENS, PADDED = 33, 12


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.replace("-", "_"))
    return folder, tiny_checkpoint(folder / "base", request.param, seed=1)


@pytest.fixture
def tokens():
    return torch.randint(1, 300, (2, TOKENS))


@pytest.fixture
def left_padding():
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :PADDED] = 0
    return mask


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_are_computed_as_in_the_family(model_type, monkeypatch):
    """Also in a process that has made no model of the family itself."""
    for student in family_classes(model_type).values():
        family = next(x for x in student.__mro__ if x.__module__.startswith("transformers."))
        for cls in reversed(student.__mro__[:-1]):
            monkeypatch.delattr(cls, "_can_set_experts_implementation_cached_value", raising=False)
        found = student._can_set_experts_implementation()
        assert found == family._can_set_experts_implementation()


def converted(base, mixer):
    folder, _ = base
    out = folder / mixer
    if not out.exists():
        convert(folder / "base", out, mixer=mixer)
    return AutoModelForCausalLM.from_pretrained(out).eval()


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, use_cache=False, **inputs).logits


def close(found, expected):
    assert expected.std() > 0.05, "the logits are too small to tell a wrong model from a right"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_softmax_is_the_original(base, tokens, left_padding):
    teacher, student = base[1], converted(base, "softmax")
    close(logits(student, tokens), logits(teacher, tokens))
    positions = (left_padding.cumsum(1) - 1).clamp(min=0)
    padded = {"attention_mask": left_padding, "position_ids": positions}
    kept = left_padding.bool()
    close(logits(student, tokens, **padded)[kept], logits(teacher, tokens, **padded)[kept])
    options = {"attention_mask": left_padding, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(student.generate(tokens, **options), teacher.generate(tokens, **options))


@torch.no_grad()
def test_supra_decodes_pads_packs_and_saves(base, tokens, left_padding, tmp_path):
    student = converted(base, "supra")
    expected = logits(student, tokens)
    cache, pieces = None, []
    for start, end in ((0, 20), (20, 31), (31, 32), (32, 33)):
        output = student(tokens[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    close(torch.cat(pieces, dim=1), expected)

    positions = (left_padding.cumsum(1) - 1).clamp(min=0)
    padded = logits(student, tokens, attention_mask=left_padding, position_ids=positions)
    close(padded[0, PADDED:], logits(student, tokens[:1, PADDED:])[0])
    close(padded[1], expected[1])

    positions = torch.cat([torch.arange(n) for n in (20, 13)]).expand(2, -1)
    packed = logits(student, tokens, position_ids=positions)
    close(packed[:, :20], logits(student, tokens[:, :20]))
    close(packed[:, 20:], logits(student, tokens[:, 20:]))

    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, tokens), expected)
