"""GGUF files: every block type that the package gguf unpacks, and one parse per command."""

import json
from itertools import cycle

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from safetensors.torch import load_file

from supra.checkpoint.opening import find_checkpoint
from supra.cli import main
from supra.conversion.convert import convert
from supra.testing import tiny_tokenizer

SIZE, VOCABULARY, LAYERS = 256, 300, 4  # the largest block has 256 values
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {
    f"blk.{layer}.{part}": f"model.layers.{layer}.{name}.weight"
    for layer in range(LAYERS)
    for part, name in PARTS.items()
}


def unpacked_types():
    """The types that gguf can unpack; it knows more types than these."""
    found = []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name.startswith(("I8", "I16", "I32", "I64", "F64")):
            continue  # types that weights do not have
        try:
            dequantize(np.zeros((1, size), dtype=np.uint8), kind)
        except (NotImplementedError, ValueError):
            continue
        found.append(kind)
    return found


TYPES = unpacked_types()


def matrix(kind, generator):
    """A random packed matrix of this type with finite values, and the values that it unpacks to."""
    if kind in (Type.F32, Type.F16):
        values = generator.standard_normal((SIZE, SIZE))
        packed = values.astype(np.float32 if kind == Type.F32 else np.float16)
        return packed, torch.from_numpy(packed.astype(np.float32))
    length, size = gguf.GGML_QUANT_SIZES[kind]
    count = SIZE * SIZE // length
    packed = generator.integers(0, 256, (4 * count, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = np.array(dequantize(packed, kind), dtype=np.float32).reshape(len(packed), -1)
    packed = packed[(np.abs(values) < 1e4).all(-1)][:count].reshape(SIZE, -1)
    return packed, torch.from_numpy(np.array(dequantize(packed, kind), dtype=np.float32))


def write_gguf(path, kinds):
    """A llama whose matrices are of these types in turn. Returns type and values by name."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(SIZE)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(SIZE)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(SIZE // 4)
    add_tokenizer(writer, path.parent / "tokenizer")
    expected = {}
    for name, kind in zip(NAMES, cycle(kinds), strict=False):
        packed, values = matrix(kind, generator)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        expected[name] = kind, values
    writer.add_tensor("token_embd.weight", np.ones((VOCABULARY, SIZE), dtype=np.float32))
    norms = ("attn_norm", "ffn_norm")
    for name in ("output_norm", *(f"blk.{n}.{norm}" for n in range(LAYERS) for norm in norms)):
        writer.add_tensor(f"{name}.weight", np.ones(SIZE, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def add_tokenizer(writer, folder):
    """Add the tiny tokenizer, as llama.cpp writes byte-level tokenizers."""
    tokenizer = tiny_tokenizer(folder)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    vocabulary += [f"<unused{n}>" for n in range(VOCABULARY - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(what was packed, what it unpacks to, what was written) by type."""
    folder = tmp_path_factory.mktemp("gguf")
    expected = write_gguf(folder / "tiny.gguf", TYPES)
    convert(folder / "tiny.gguf", folder / "rnn", mixer="softmax")
    stored = load_file(folder / "rnn" / "model.safetensors")
    return {kind: (name, values, stored[NAMES[name]]) for name, (kind, values) in expected.items()}


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_is_unpacked(kind, converted):
    name, values, found = converted[kind]
    assert found.dtype == torch.float32
    assert values.std() > 1e-4
    if name.endswith(("attn_q", "attn_k")):  # llama.cpp stores their rows in another order
        assert sorted(found.tolist()) == sorted(values.tolist())
    else:
        assert torch.equal(found, values)


def test_the_table_holds_all_families_of_types():
    names = {kind.name for kind in TYPES}
    assert names >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert names >= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS"}
    assert len(TYPES) <= len(NAMES)


@pytest.fixture
def parses(monkeypatch):
    """A list that gets longer with every parse of a GGUF file."""
    parsed, parse = [], gguf.GGUFReader.__init__

    def counted(self, path, *args, **kwargs):
        parsed.append(path)
        parse(self, path, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    return parsed


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "--out", "rnn", "--model"],
        ["eval", "text", "--text", "t.txt", "--sequence-length", "32", "--model"],
        ["generate", "--prompt", "The", "--max-new-tokens", "2", "--model"],
        ["inspect"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_parses_the_file_once(command, parses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf", [Type.Q8_0])
    (tmp_path / "t.txt").write_text("The river rises in the hills. " * 200)
    reader = gguf.GGUFReader
    main([*command, "tiny.gguf"])
    assert len(parses) == 1
    assert gguf.GGUFReader is reader


def test_another_file_is_not_taken_for_it(tmp_path):
    for name, kind in (("a", Type.Q8_0), ("b", Type.F32)):
        (tmp_path / name).mkdir()
        write_gguf(tmp_path / name / "tiny.gguf", [kind])
    one, two = (find_checkpoint(str(tmp_path / name / "tiny.gguf")) for name in "ab")
    with one._gguf.parsed():
        weights = two.model().model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weights, one.model().model.layers[0].mlp.up_proj.weight)
    assert one.config().vocab_size == VOCABULARY
