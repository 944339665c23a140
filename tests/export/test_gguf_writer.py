"""GGUF files hold the tensors, fields and words that they were made from. Engines are tested in
tests/engines."""

import pytest
import torch

from supra.errors import UserError
from supra.export.gguf import granitehybrid, qwen35
from supra.export.gguf.types import BF16, F16, F32, Q4_K, Q5_0, Q6_K, Q8_0, encoded, tensor_types
from supra.export.gguf.vocabulary import REGEXES, vocabulary
from supra.export.gguf.writer import write_gguf
from supra.export.native import NativeModel
from supra.testing import tiny_tokenizer
from tests.export.native_models import native, tiny_granite, tiny_qwen3_5

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")


def written(model, folder, type="f32"):
    """A reader of the file that the model is written to."""
    file = folder / "model.gguf"
    words = vocabulary(tiny_tokenizer(folder), model.metadata["vocab_size"])
    write_gguf(model, words, file, type, {"name": "tiny"})
    return gguf.GGUFReader(file)


def values(reader):
    """The tensors of the file by name, in float32."""
    return {
        x.name: torch.tensor(gguf.quants.dequantize(x.data, x.tensor_type)) for x in reader.tensors
    }


def test_qwen3_5s_norms_decays_and_convolutions_are_in_llama_cpps_form(tmp_path):
    model = tiny_qwen3_5()
    found = values(written(qwen35.gguf_model(native(model)), tmp_path))
    own = model.state_dict()
    linear, path = "model.layers.0.linear_attn", "blk.0"
    assert torch.equal(found[f"{path}.ssm_a"], -own[f"{linear}.A_log"].exp())
    assert torch.equal(found[f"{path}.ssm_conv1d.weight"], own[f"{linear}.conv1d.weight"][:, 0])
    assert torch.equal(found[f"{path}.ssm_norm.weight"], own[f"{linear}.norm.weight"])
    assert torch.equal(found["output_norm.weight"], own["model.norm.weight"] + 1)
    assert torch.equal(found["blk.1.attn_q.weight"], own["model.layers.1.self_attn.q_proj.weight"])
    assert len(found) == len(own)


@pytest.mark.parametrize("pairs", [1, 5, 12, 16])
def test_every_rotary_pair_of_qwen3_5_belongs_to_an_axis(pairs):
    config = {**native(tiny_qwen3_5()).config, "head_dim": 2 * pairs}
    fields = qwen35.gguf_model(NativeModel(config, [])).metadata
    assert sum(fields["rope.dimension_sections"]) == pairs
    assert fields["rope.dimension_sections"] == [len(range(x, pairs, 3)) for x in range(3)] + [0]


def test_granites_mlp_is_split_and_its_pairs_are_neighbours(tmp_path):
    model = tiny_granite()
    found = values(written(granitehybrid.gguf_model(native(model)), tmp_path))
    own = model.state_dict()
    gate, up = own["model.layers.0.shared_mlp.input_linear.weight"].chunk(2)
    assert torch.equal(found["blk.0.ffn_gate.weight"], gate)
    assert torch.equal(found["blk.0.ffn_up.weight"], up)
    query = own["model.layers.1.self_attn.q_proj.weight"].unflatten(0, (4, 16))
    heads = found["blk.1.attn_q.weight"].unflatten(0, (4, 16))
    assert torch.equal(heads[:, 0::2], query[:, :8])
    assert torch.equal(heads[:, 1::2], query[:, 8:])


def test_granite_names_its_recurrent_layers_and_its_switches(tmp_path):
    reader = written(granitehybrid.gguf_model(native(tiny_granite())), tmp_path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["granitehybrid.attention.head_count_kv"] == [0, 2, 0]
    assert fields["granitehybrid.rope.scaling.finetuned"] is True
    assert fields["general.name"] == "tiny"
    assert fields["tokenizer.ggml.eos_token_id"] == 0


def test_granite_of_another_width_is_refused():
    model = native(tiny_granite())
    config = {**model.config, "mamba_d_head": 8}
    with pytest.raises(UserError, match=r"llama\.cpp needs twice the hidden_size \(=64\)"):
        granitehybrid.gguf_model(NativeModel(config, model.tensors))


@pytest.mark.parametrize("type, kind", [("f16", F16), ("bf16", BF16), ("q8_0", Q8_0)])
def test_matrices_are_stored_in_the_type_and_the_rest_in_float32(tmp_path, type, kind):
    model = qwen35.gguf_model(native(tiny_qwen3_5()))
    reader = written(model, tmp_path, type)
    kinds = {x.name: int(x.tensor_type) for x in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_qkv.weight"] == kind
    assert kinds["blk.0.ssm_conv1d.weight"] == kinds["blk.0.attn_norm.weight"] == F32
    found = values(reader)
    for tensor in model.tensors:
        bound = {F16: 2**-11, BF16: 2**-8, Q8_0: 1 / 200}[kind] * tensor.load().abs().max()
        assert (found[tensor.name] - tensor.load()).abs().max() <= bound


def test_eight_bits_are_those_of_the_package_gguf():
    rows = torch.randn(7, 96)
    rows[2, :32] = 0
    expected = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(encoded(rows, Q8_0), torch.tensor(expected))


def test_four_bits_follow_llama_cpps_mixture():
    model = qwen35.gguf_model(native(tiny_qwen3_5()))
    names = [tensor.name for tensor in model.tensors]
    wide = [x._replace(shape=(*x.shape[:-1], 256)) for x in model.tensors]
    kinds = dict(zip(names, tensor_types(model_of(model, wide), "q4_k_m"), strict=True))
    assert kinds["output.weight"] == kinds["blk.1.attn_v.weight"] == Q6_K
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_gate.weight"] == Q4_K
    assert [kinds[f"blk.{layer}.ffn_down.weight"] for layer in range(3)] == [Q4_K, Q4_K, Q6_K]
    narrow = dict(zip(names, tensor_types(model, "q4_k_m"), strict=True))
    assert narrow["blk.0.ssm_out.weight"] == Q5_0  # rows of 64 values
    assert narrow["output.weight"] == Q8_0


def model_of(model, tensors):
    return type(model)(model.architecture, model.metadata, tensors)


@pytest.mark.parametrize("type", ["q8_0", "q4_k_m"])
def test_rows_that_blocks_do_not_divide_are_refused(type):
    model = qwen35.gguf_model(native(tiny_qwen3_5(hidden_size=72)))
    with pytest.raises(UserError, match=r"multiple of 32 values, and .* has 72: use f16 or bf16"):
        tensor_types(model, type)


def test_weights_that_overflow_are_refused(tmp_path):
    model = tiny_qwen3_5()
    model.lm_head.weight.data[3, 4] = 1e5
    with pytest.raises(UserError, match=r"output\.weight is not finite as f16: give --type bf16"):
        written(qwen35.gguf_model(native(model)), tmp_path, "f16")


def test_an_unknown_type_is_refused():
    with pytest.raises(UserError, match=r"unknown type 'q4' \(known: bf16, f16"):
        tensor_types(qwen35.gguf_model(native(tiny_qwen3_5())), "q4")


class TestVocabulary:
    def test_has_a_word_of_a_kind_for_every_embedding(self, tmp_path):
        tokenizer = tiny_tokenizer(tmp_path)
        tokenizer.add_tokens("<think>")
        size = len(tokenizer)
        fields = vocabulary(tokenizer, size + 2)
        words, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        assert words[0] == "<|endoftext|>"
        assert words[size - 1 : size + 1] == ["<think>", f"[PAD{size}]"]
        assert (kinds[0], kinds[1], kinds[size - 1], kinds[size]) == (3, 1, 4, 5)
        assert fields["tokenizer.ggml.pre"] == "gpt-2"

    def test_says_what_stands_around_a_text(self, tmp_path):
        plain = vocabulary(tiny_tokenizer(tmp_path), 300)
        assert plain["tokenizer.ggml.add_bos_token"] is False
        around = tiny_tokenizer(tmp_path, "<|endoftext|> $A <|endoftext|>")
        fields = vocabulary(around, 300)
        assert fields["tokenizer.ggml.add_bos_token"] is True
        assert fields["tokenizer.ggml.add_eos_token"] is True

    def test_refuses_other_tokens_around_a_text(self, tmp_path):
        with pytest.raises(UserError, match=r"puts \[1\] before and \[\] behind"):
            vocabulary(tiny_tokenizer(tmp_path, "<bos> $A"), 300)

    @pytest.mark.parametrize("name", sorted(set(REGEXES.values())))
    def test_knows_regexes_by_name(self, tmp_path, name):
        regex = next(key for key, value in REGEXES.items() if value == name)
        ignores = name in ("llama-bpe", "tekken")
        fields = vocabulary(with_regex(tmp_path, regex, ignores), 300)
        assert fields["tokenizer.ggml.pre"] == name

    def test_refuses_an_unknown_regex(self, tmp_path):
        with pytest.raises(UserError, match=r"no name for how this tokenizer splits words"):
            vocabulary(with_regex(tmp_path, r"\w+|\W+", False), 300)

    def test_scores_characters_by_the_order_of_merges(self):
        fields = vocabulary(on_characters(), 264)
        words, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
        score = dict(zip(words, scores, strict=True))
        assert fields["tokenizer.ggml.model"] == "llama"
        assert score["ab"] > score["▁ab"] > score["a"]
        assert fields["tokenizer.ggml.token_type"][words.index("<0x41>")] == 6
        assert fields["tokenizer.ggml.token_type"][words.index("<unk>")] == 2


def with_regex(folder, regex, ignores_merges):
    """The tiny tokenizer with words split by a regular expression."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = tiny_tokenizer(folder)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.backend_tokenizer.model.ignore_merges = ignores_merges
    return tokenizer


def on_characters():
    """A tokenizer after SentencePiece, as Llama 2 and Mistral have it."""
    from transformers import LlamaTokenizer

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "a", "b", "ab", "▁ab"]
    return LlamaTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[("a", "b"), ("▁", "ab")],
    )
