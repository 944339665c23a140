"""The way out that an error names works, in each case that leads to the error."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from supra.checkpoint.opening import Checkpoint, find_checkpoint
from supra.conversion.convert import convert
from supra.errors import UserError, not_finite
from supra.long_context.diagnosis import diagnose
from supra.long_context.statistics import RecurrentLayers
from supra.model.families import FAMILIES, NATIVE, REFUSED, no_mixer
from supra.model.original import original
from supra.model.recurrent import mixers_of
from supra.testing import tiny_checkpoint, tiny_config, untrained_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways") / "base"
    tiny_checkpoint(folder)
    return folder


def model_of(kind):
    """A model without a recurrent mixer, on the meta device."""
    if kind == "softmax":
        return untrained_model(tiny_config("llama"), "softmax")
    sizes = {"num_heads": 12} if kind == "mamba2" else {}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(kind, **sizes))


NO_MIXER = {
    "llama": "the model has no mixers: run `supra convert` on it first",
    "mamba2": "the model has no mixers, and model_type 'mamba2' does not convert: some or all",
    "falcon": "the model has no mixers, and model_type 'falcon' does not convert: its attention",
    "softmax": "all layers of the model keep softmax attention: convert its teacher again",
}


@pytest.mark.parametrize("kind", NO_MIXER)
def test_a_model_without_mixers(kind):
    with pytest.raises(UserError) as error:
        original(model_of(kind))
    assert str(error.value).startswith(NO_MIXER[kind])


@pytest.mark.parametrize(
    ("kind", "need"),
    [
        ("llama", RecurrentLayers.of),
        ("falcon", RecurrentLayers.of),
        ("softmax", RecurrentLayers.of),
        ("llama", mixers_of),
    ],
)
def test_a_model_without_states(kind, need):
    with pytest.raises(UserError) as error:
        need(model_of(kind))
    assert str(error.value).startswith(NO_MIXER[kind])


@pytest.mark.parametrize("need", [RecurrentLayers.of, mixers_of])
def test_a_model_whose_states_cannot_be_read(need):
    with pytest.raises(UserError, match=r"states of model_type 'mamba': it reads .*bamba.*mamba2"):
        need(model_of("mamba"))


def test_what_is_recurrent_already_has_a_way_out():
    for family in NATIVE:
        if family in REFUSED:
            assert "supra diagnose, supra eval and the stage extend take" in no_mixer(family)


def test_who_is_told_to_convert_can():
    told = [x for x in (*FAMILIES, *REFUSED) if no_mixer(x).endswith("`supra convert` on it first")]
    assert told == [*FAMILIES]


def test_a_gguf_file_is_not_to_be_saved_but_converted(base, tmp_path, monkeypatch):
    """--fix would refuse the folder of the saved model, too."""
    checkpoint = replace(find_checkpoint(str(base)), gguf_file="model.gguf")
    tokenizer = find_checkpoint(str(base)).tokenizer()
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(Checkpoint, "model", lambda *_: model_of("llama"))
    (tmp_path / "text.txt").write_text("the river")
    with pytest.raises(UserError, match="run `supra convert` on it first"):
        diagnose(
            checkpoint, str(tmp_path / "text.txt"), stream_length=64, trained_length=16, fix="auto"
        )


@pytest.mark.parametrize(
    ("dtype", "way_out"),
    [
        (torch.float16, "in float16: convert with dtype bfloat16 or float32"),
        (torch.bfloat16, "in bfloat16: its weights are damaged"),
        (torch.float32, "in float32: its weights are damaged"),
    ],
)
def test_another_dtype_is_named_only_where_it_helps(dtype, way_out):
    assert way_out in str(not_finite("it", dtype))


OPTIONS = [
    ("supra", {"normalize": "sum", "feature_map": "identity"}, {"feature_map": "relu"}),
    ("supra", {"normalize": "sum", "feature_map": "identity"}, {"feature_map": "hedgehog"}),
    ("supra", {"normalize": "sum", "feature_map": "sign_pair"}, {"normalize": "group"}),
    ("supra", {"expansion": 2, "feature_map": "identity"}, {"feature_map": "hedgehog"}),
    ("supra", {"expansion": 2, "feature_map": "identity"}, {"feature_map": "relu"}),
    ("supra", {"expansion": 2, "feature_map": "identity"}, {"feature_map": "sign_pair"}),
    ("window", {"expansion": 2, "feature_map": "softmax_pair"}, {"feature_map": "hedgehog"}),
    ("window", {"expansion": 2, "feature_map": "softmax_pair"}, {"feature_map": "relu"}),
]


@pytest.mark.parametrize(("mixer", "refused", "way_out"), OPTIONS)
def test_options_that_do_not_fit(mixer, refused, way_out):
    config = tiny_config("llama")
    with pytest.raises(UserError) as error:
        untrained_model(config, mixer, refused)
    (value,) = way_out.values()
    assert value in str(error.value).rpartition(": ")[2]
    tokens = torch.arange(9)[None]
    assert untrained_model(config, mixer, refused | way_out)(tokens).logits.isfinite().all()


def test_tied_weights_that_differ(base, tmp_path):
    tiny_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    save_file(tensors | head, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="set tie_word_embeddings to false in its config"):
        convert(tmp_path / "base", tmp_path / "rnn", mixer="supra")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": False})
    )
    convert(tmp_path / "base", tmp_path / "rnn", mixer="supra")


def test_a_file_is_not_to_be_emptied(base, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file: name a folder"):
        convert(base, tmp_path / "out", mixer="supra")


def test_weights_that_lack_a_tensor(base, tmp_path):
    """A config with more layers than the weights is not the download's fault."""
    tiny_checkpoint(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text()) | {"num_hidden_layers": 3}
    file.write_text(json.dumps(config | {"layer_types": None}))
    with pytest.raises(UserError, match="or weights and config do not belong together"):
        convert(tmp_path / "base", tmp_path / "rnn", mixer="supra")


def test_pickled_weights_can_be_saved_as_safetensors(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="save the model with save_pretrained first"):
        convert(tmp_path / "pickled", tmp_path / "rnn", mixer="supra")
    AutoModelForCausalLM.from_pretrained(tmp_path / "pickled").save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "rnn", mixer="supra")
