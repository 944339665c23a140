"""Teachers as GGUF files in llama.cpp, beside which exported models are measured."""

import pytest
import torch

from supra.checkpoint.opening import find_checkpoint
from supra.errors import UserError
from supra.export import llama_cpp
from supra.export.gguf.transformer import ARCHITECTURES, gguf_model
from supra.export.gguf.vocabulary import vocabulary
from supra.export.gguf.writer import write_gguf
from supra.export.llama_cpp import LlamaCpp
from supra.testing import tiny_checkpoint

pytest.importorskip("gguf", reason="the package gguf is not installed")
if not llama_cpp.is_installed():
    pytest.skip("the package xllamacpp is not installed", allow_module_level=True)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, {}) for family in ARCHITECTURES), ("llama", {"rope_parameters": LLAMA3})],
)
def test_logits_are_those_of_transformers(family, changes, tmp_path):
    tiny_checkpoint(tmp_path / "teacher", family, **changes)
    checkpoint = find_checkpoint(str(tmp_path / "teacher"))
    tokens = torch.randint(1, 300, (1, 101))
    with torch.no_grad():
        expected = checkpoint.model(torch.float32).eval()(tokens).logits[0]
    model = gguf_model(checkpoint)
    words = vocabulary(checkpoint.tokenizer(), model.metadata["vocab_size"])
    write_gguf(model, words, tmp_path / "teacher.gguf")
    with LlamaCpp(tmp_path / "teacher.gguf", context=256) as engine:
        found = engine.read(tokens[0].tolist())
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_other_families_are_refused(tmp_path):
    tiny_checkpoint(tmp_path / "teacher", "gpt_neox")
    with pytest.raises(UserError, match=r"is a gpt_neox: only llama, qwen2, qwen3"):
        gguf_model(find_checkpoint(str(tmp_path / "teacher")))


def test_scaled_positions_of_other_families_are_refused(tmp_path):
    tiny_checkpoint(tmp_path / "teacher", "qwen2", rope_parameters=LLAMA3)
    with pytest.raises(UserError, match=r"scales rotary positions, .* for no qwen2"):
        gguf_model(find_checkpoint(str(tmp_path / "teacher")))


def test_repeated_keys_and_values_are_those_of_a_text_read_again(tmp_path):
    """In a model of one layer they do not depend on what comes before."""
    tiny_checkpoint(tmp_path / "teacher", "llama", num_hidden_layers=1)
    checkpoint = find_checkpoint(str(tmp_path / "teacher"))
    model = gguf_model(checkpoint)
    words = vocabulary(checkpoint.tokenizer(), model.metadata["vocab_size"])
    write_gguf(model, words, tmp_path / "teacher.gguf")
    tokens = torch.randint(1, 300, (37,)).tolist()
    with LlamaCpp(tmp_path / "teacher.gguf", context=256) as engine:
        assert engine.only_attends
        expected = engine.read([*tokens * 3, 5])[-1]
        size = engine.state_bytes
        engine.reset()
        engine.read(tokens)
        engine.repeat(3)
        found = engine.read([5])[0]
        assert engine.position == 3 * 37 + 1 and engine.state_bytes == size
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
