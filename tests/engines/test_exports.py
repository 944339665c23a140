"""Converted models as GGUF files, in llama.cpp: pure, hybrid and Qwen2-like teachers."""

import pytest
import torch

from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.export import llama_cpp
from supra.export.gguf.export import export_gguf
from supra.export.llama_cpp import LlamaCpp
from supra.testing import tiny_checkpoint
from tests.export.models import shake

pytest.importorskip("gguf", reason="the package gguf is not installed")
if not llama_cpp.is_installed():
    pytest.skip("the package xllamacpp is not installed", allow_module_level=True)

# teacher, mixer, its options, layers that keep attention
FORMS = {
    "qwen35-pure": ("llama", "gated_deltanet", {}, []),
    "qwen35-hybrid": ("qwen3", "gated_deltanet", {}, [1]),
    "granitehybrid-pure": ("llama", "mamba2", {"form": "granite"}, []),
    "granitehybrid-hybrid": ("llama", "mamba2", {"form": "granite"}, [1]),
    "rwkv6qwen2-pure": ("llama", "rwkv", {"form": "qrwkv"}, []),
    "rwkv6qwen2-biases": ("qwen2", "rwkv", {"form": "qrwkv"}, []),
}
EXACT = 1e-4  # of the largest logit; a few 1e-5 were measured
PROMPT, NEW = 64, 64


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory, tokenizer):
    """A converted model with a real tokenizer, and its GGUF file."""
    family, mixer, options, keep = FORMS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tiny_checkpoint(folder / "base", family, vocab_size=len(tokenizer), num_hidden_layers=3)
    tokenizer.save_pretrained(folder / "base")
    chosen = {"mixer": mixer, "options": options, "keep_attention": keep}
    convert(folder / "base", folder / "rnn", export_ready="gguf", **chosen)
    shake(folder / "rnn")
    idle = not keep and mixer != "rwkv"
    file = folder / "rnn.gguf"
    result = export_gguf(folder / "rnn", file, type="f32", idle_attention=idle)
    return find_checkpoint(str(folder / "rnn")), file, result


def test_the_export_compares_logits(pair):
    _, file, result = pair
    assert result.difference.largest < EXACT
    assert result.engine == llama_cpp.version() and result.rounded is None
    assert result.bytes == file.stat().st_size
    assert [path.name for path in file.parent.glob(".*")] == []


def test_logits_and_greedy_text_are_those_of_the_converted_model(pair, tokenizer, text):
    checkpoint, file, _ = pair
    model = checkpoint.model(torch.float32).eval()
    tokens = tokenizer(text)["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    given = torch.tensor([tokens[:PROMPT]])
    written = model.generate(given, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    with LlamaCpp(file, context=4096) as engine:
        apart = (engine.read(tokens) - expected).abs().max() / expected.abs().max()
        assert apart < EXACT
        assert engine.generate(tokens[:PROMPT], NEW) == written[0, PROMPT:].tolist()
