"""Exported models have the logits and the generated text of the converted ones."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from supra.checkpoint.opening import find_checkpoint
from supra.checkpoint.weights import FolderReader
from supra.export.export import export
from supra.export.targets import TARGETS
from tests.export.loaders import asked
from tests.export.models import ODD, converted

# family, target, kept layers, sizes
MODELS = {
    "qwen3_5-pure": ("llama", "qwen3_5", [], ODD),
    "qwen3_5-hybrid": ("qwen3", "qwen3_5", [1], {}),
    "granite-pure": ("llama", "granite", [], ODD),
    "granite-hybrid": ("mistral", "granite", [1], {}),
}
TOLERANCE = 1e-4  # absolute; the largest logits are about 10


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """The folders of a converted model and of its export, and what the export said."""
    family, target, keep, sizes = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    source = converted(folder, family, target, keep, **sizes)
    return (
        source,
        folder / "out",
        export(source, folder / "out", to=target, idle_attention=not keep),
    )


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_logits_of_prompts_and_of_decoded_tokens_are_equal(pair):
    one, other = (loaded(folder) for folder in pair[:2])
    tokens = torch.randint(1, 300, (2, 90))
    first, second = (model(tokens[:, :83], use_cache=True) for model in (one, other))
    torch.testing.assert_close(second.logits, first.logits, rtol=0, atol=TOLERANCE)
    for token in tokens[:, 83:].unbind(1):
        first, second = (
            model(token[:, None], past_key_values=before.past_key_values, use_cache=True)
            for model, before in ((one, first), (other, second))
        )
        torch.testing.assert_close(second.logits, first.logits, rtol=0, atol=TOLERANCE)


def test_generated_tokens_are_equal(pair):
    tokens = torch.randint(1, 300, (1, 12))
    texts = [loaded(x).generate(tokens, max_new_tokens=16, do_sample=False) for x in pair[:2]]
    assert torch.equal(*texts)


def test_left_padding_changes_nothing(pair):
    """transformers masks padding in its recurrent layers."""
    model = loaded(pair[1])
    tokens, pad = torch.randint(1, 300, (1, 9)), torch.zeros(1, 4, dtype=torch.int64)
    mask = torch.cat([pad, torch.ones_like(tokens)], 1)
    padded = model(torch.cat([pad, tokens], 1), attention_mask=mask, use_cache=False).logits
    alone = model(tokens, use_cache=False).logits
    torch.testing.assert_close(padded[:, 4:], alone, rtol=0, atol=TOLERANCE)


def test_the_export_says_what_it_measured(pair):
    assert pair[2].difference.largest < 1e-5
    assert pair[2].rounded is None  # float32 is kept
    assert "by" in pair[2].lines()[1]


def test_tokenizers_read_the_same(pair):
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in pair[:2])
    text = "In 1843 the bridge was built of 20,000 stones;\n\n  it stands."
    assert one(text) == other(text)


def test_nothing_of_supra_is_left(pair):
    names = {file.name for file in pair[1].iterdir()}
    assert not {"modeling_supra.py", "conversion.json"} & names
    config = json.loads((pair[1] / "config.json").read_text())
    assert not {"supra", "auto_map", "base_model_type"} & config.keys()


def test_engines_find_every_tensor_in_its_shape(pair):
    """The names and shapes that vLLM and SGLang ask for, and no others."""
    config = json.loads((pair[1] / "config.json").read_text())
    written = {name: spec.shape for name, spec in FolderReader(pair[1]).specs.items()}
    assert written == asked(config)


def test_a_tensor_is_made_when_it_is_loaded_and_has_the_shape_it_declares(pair):
    checkpoint = find_checkpoint(str(pair[0]))
    target = TARGETS[pair[2].target]
    for name, shape, load in target.native_model(checkpoint).tensors:
        assert load().shape == shape, name
