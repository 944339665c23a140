"""Native models of transformers as GGUF files, in llama.cpp."""

import pytest
import torch

from supra.errors import UserError
from supra.export import llama_cpp
from supra.export.gguf import granitehybrid, qwen35
from supra.export.gguf.types import Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, row_bytes
from supra.export.gguf.vocabulary import vocabulary
from supra.export.gguf.writer import write_gguf
from supra.export.llama_cpp import LlamaCpp
from tests.export.native_models import native, tiny_granite, tiny_qwen3_5

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
if not llama_cpp.is_installed():
    pytest.skip("the package xllamacpp is not installed", allow_module_level=True)

PROMPT, TOKENS, NEW = 90, 101, 64
MODELS = {"qwen35": (tiny_qwen3_5, qwen35), "granitehybrid": (tiny_granite, granitehybrid)}
EXACT = 1e-4  # of the largest logit; 2e-5 was measured
# Of the logits' norm. Random weights lose much by rounding; logits of other weights are 1.4 apart.
NEAR = {"f16": 0.02, "bf16": 0.1, "q8_0": 0.2, "q4_k_m": 0.8}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tokenizer):
    make, architecture = MODELS[request.param]
    made = make(len(tokenizer), initializer_range=0.2)
    return made, architecture.gguf_model(native(made)), vocabulary(tokenizer, len(tokenizer))


@pytest.fixture(scope="module")
def tokens(tokenizer, text):
    return tokenizer(text)["input_ids"][:TOKENS]


@torch.no_grad()
def logits(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def apart(found, expected):
    """The largest difference, relative to the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_logits_are_those_of_transformers(model, tokens, tmp_path):
    made, rewritten, words = model
    write_gguf(rewritten, words, tmp_path / "model.gguf")
    expected = logits(made, tokens)
    with LlamaCpp(tmp_path / "model.gguf", context=256) as engine:
        assert apart(engine.read(tokens), expected) < EXACT
        engine.reset()
        first = engine.read(tokens[:PROMPT])
        steps = [engine.read([token]) for token in tokens[PROMPT:]]
        assert apart(torch.cat([first, *steps]), expected) < EXACT


def test_greedy_text_is_that_of_transformers(model, tokens, tmp_path):
    made, rewritten, words = model
    write_gguf(rewritten, words, tmp_path / "model.gguf")
    given = torch.tensor([tokens])
    expected = made.generate(given, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    with LlamaCpp(tmp_path / "model.gguf", context=256) as engine:
        assert engine.generate(tokens, NEW) == expected[0, len(tokens) :].tolist()


@pytest.mark.parametrize("type", NEAR)
def test_narrow_types_load_and_stay_near(model, tokens, tmp_path, type):
    made, rewritten, words = model
    write_gguf(rewritten, words, tmp_path / "model.gguf", type)
    with LlamaCpp(tmp_path / "model.gguf", context=256) as engine:
        found, expected = engine.read(tokens), logits(made, tokens)
    assert (found - expected).norm() < NEAR[type] * expected.norm()


def test_text_becomes_the_tokenizers_tokens(model, tokenizer, text, tmp_path):
    _, rewritten, words = model
    write_gguf(rewritten, words, tmp_path / "model.gguf", "f16")
    with LlamaCpp(tmp_path / "model.gguf", context=32) as engine:
        tokens = engine.tokenize(text)
        assert tokens == tokenizer(text)["input_ids"]
        assert engine.detokenize(tokens) == text


@pytest.mark.parametrize("kind, error", [(Q4_K, 0.1), (Q5_0, 0.08), (Q5_K, 0.05), (Q6_K, 0.03)])
def test_blocks_mean_the_rows_that_they_were_made_of(kind, error):
    rows = torch.randn(3, 512)
    blocks = llama_cpp.quantise(rows, kind)
    assert blocks.shape[1] == row_bytes(kind, 512)
    found = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind))
    assert (torch.tensor(found) - rows).abs().mean() < error
    assert row_bytes(Q5_1, 512) == 16 * 24


def test_a_text_beyond_the_context_is_refused(model, tokens, tmp_path):
    _, rewritten, words = model
    write_gguf(rewritten, words, tmp_path / "model.gguf")
    with (
        LlamaCpp(tmp_path / "model.gguf", context=256) as engine,
        pytest.raises(UserError, match=r"303 tokens needs a longer context than 256"),
    ):
        engine.read(tokens * 3)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(UserError, match=r"xllamacpp .* does not load .*model\.gguf: \S"):
        LlamaCpp(tmp_path / "model.gguf")


@pytest.mark.parametrize("bias, least, most", [(-4, 0, 3e-5), (-9, 3e-5, 3e-3), (-11, 1e-4, 1e-2)])
def test_small_steps_lose_digits_in_llama_cpp(tokenizer, tokens, tmp_path, bias, least, most):
    """Its softplus is log(1 + eˣ). A step of e⁻⁴ loses nothing, and one of e⁻¹¹ three digits."""
    made = tiny_granite(len(tokenizer))
    for name, weight in made.named_parameters():
        if name.endswith("dt_bias"):
            weight.data += bias
        elif name.endswith("mamba.D"):
            weight.data.zero_()  # else the skip hides it
    words = vocabulary(tokenizer, len(tokenizer))
    write_gguf(granitehybrid.gguf_model(native(made)), words, tmp_path / "model.gguf")
    with LlamaCpp(tmp_path / "model.gguf", context=256) as engine:
        assert least <= apart(engine.read(tokens), logits(made, tokens)) < most


def test_a_library_of_another_layout_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(llama_cpp._DEFAULTS, "micro_batch", 1024)
    llama_cpp._library.cache_clear()
    with pytest.raises(UserError, match=r"is a llama\.cpp of another version than the ones"):
        LlamaCpp(tmp_path / "model.gguf")
