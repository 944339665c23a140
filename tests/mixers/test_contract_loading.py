"""What every mixer owes a checkpoint: converted, saved and loaded, it computes what it did."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from supra.conversion.convert import convert
from supra.mixers import MIXERS, build_mixer, resolve_mixer
from supra.model.attention import attention_modules
from supra.testing import mixer_inputs


def tensors_of(module):
    """Every tensor that a module and its parts hold, registered or not, with a name for it."""

    def found(name, value):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, x in value.items():
                yield from found(key, x)
        elif isinstance(value, list | tuple):
            for x in value:
                yield from found(name, x)

    for part in module.modules():
        yield from found(type(part).__name__, vars(part))


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_a_loaded_mixer_is_the_converted_one(name, base, tmp_path):
    """Loading builds a model without memory and then fills in what is registered: a tensor that is
    a plain attribute stays on the device `meta`, and a buffer that nothing writes holds garbage."""
    convert(base, tmp_path / "rnn", mixer=name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn").eval()
    mixers = [attention.mixer for attention in attention_modules(model)]
    for mixer in mixers:
        for key, x in tensors_of(mixer):
            assert not x.is_meta, f"{key} is on meta after loading: register it as a buffer"
    resolved, options = resolve_mixer(name)
    for mixer in mixers:
        inputs = mixer_inputs(mixer.shape, 12)
        built = build_mixer(resolved, mixer.shape, options)
        built.reset_parameters()
        built.load_state_dict(mixer.state_dict())
        torch.testing.assert_close(mixer(inputs)[0], built.eval()(inputs)[0], atol=0, rtol=0)
    tokens = torch.arange(1, 20)[None]
    text = model.generate(tokens, do_sample=False, max_new_tokens=5)
    assert text.shape == (1, 24)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(text).logits, model(text).logits)
    assert torch.equal(again.generate(tokens, do_sample=False, max_new_tokens=5), text)
