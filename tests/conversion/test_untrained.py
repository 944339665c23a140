"""Untrained models: their weights, options, sizes and tokenizer, and that they load and train."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import supra.uptrain
from supra.checkpoint.card import read_card
from supra.checkpoint.checksums import verify
from supra.conversion.like import read_like
from supra.conversion.untrained import init, untrained_options
from supra.errors import UserError
from supra.mixers import MIXERS, PRESETS
from supra.testing import tiny_checkpoint, tiny_config, tiny_tokenizer
from supra.uptrain import load_config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Its weights are damaged, because nothing may read them."""
    folder = tmp_path_factory.mktemp("like") / "base"
    tiny_checkpoint(folder, "smollm3", num_hidden_layers=3, tie_word_embeddings=True)
    (folder / "model.safetensors").write_bytes(b"damaged")
    return folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def fails(match, *args, **settings):
    with pytest.raises(UserError, match=match):
        init(*args, **settings)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_weights_are_those_of_a_fresh_model_of_the_family(family, tmp_path):
    """For every mixer the same ones: a comparison of mixers starts from one point."""
    tiny_checkpoint(tmp_path / "base", family)
    set_seed(5)
    fresh = AutoModelForCausalLM.from_config(tiny_config(family)).state_dict()
    for mixer in ("h3", "softmax"):
        init(tmp_path / "base", tmp_path / mixer, mixer=mixer, keep_attention=[1], seed=5)
        state = loaded(tmp_path / mixer).state_dict()
        own = {name: x for name, x in state.items() if ".mixer." not in name}
        assert own.keys() == fresh.keys()
        assert all(torch.equal(x, fresh[name]) for name, x in own.items())
        mixing = {name.split(".mixer.")[0] for name in state if ".mixer." in name}
        assert len(mixing) == (mixer == "h3"), "layer 1 keeps attention"


def test_h3_starts_as_published(base, tmp_path):
    report = init(base, tmp_path / "h3", mixer="h3", options={"d_state": 6}, keep_attention=[1])
    assert report.layers == ["h3", "softmax", "h3"]
    options = report.options["h3"]
    assert options["init"] == "published" and options["d_state"] == 6
    assert not options["scale"] and not options["output_gate"]
    first, second = (loaded(tmp_path / "h3").model.layers[n].self_attn.mixer for n in (0, 2))
    assert torch.equal(first.query_weight, torch.ones_like(first.query_weight))
    steps = first.model.log_dt.exp()
    assert 1e-3 <= steps.min() < steps.max() <= 0.1
    assert not torch.equal(first.model.C, second.model.C), "layers differ"


def test_seeds_and_dtypes(base, tmp_path):
    settings = {"mixer": "mamba2", "dtype": torch.bfloat16}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        init(base, tmp_path / name, seed=seed, **settings)
    first, again, other = (loaded(tmp_path / n).state_dict() for n in ("first", "again", "other"))
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.mixer.dt.weight"):
        assert not torch.equal(first[name], other[name])
        assert first[name].dtype == (torch.float32 if "mixer" in name else torch.bfloat16)


def test_layers_that_wait_for_calibration_elsewhere_pass_a_signal(tmp_path):
    """Converted, these two give 0 until they are calibrated."""
    tiny_checkpoint(tmp_path / "base")
    init(tmp_path / "base", tmp_path / "m", mixer="mamba2", options={"form": "granite"})
    model, seen = loaded(tmp_path / "m"), []
    for layer in model.model.layers:
        layer.self_attn.mixer.register_forward_hook(lambda *call: seen.append(call[2][0]))
    model(torch.tensor([[3, 1, 4, 1, 5]]))
    assert len(seen) == 2
    assert all(output.isfinite().all() and output.abs().max() > 0 for output in seen)


def test_options_are_the_users_then_the_published_ones():
    for mixer in (*MIXERS, *PRESETS):
        name, options = untrained_options(mixer)
        assert options.items() >= MIXERS[name].from_scratch.items()
    _, options = untrained_options("mamba2", {"rotary": True, "conv_size": 2})
    assert options["rotary"] and options["conv_size"] == 2 and options["activation"] == "silu"
    assert untrained_options("t2r")[1]["feature_map"] == "relu"


def test_sizes_change_and_what_depends_on_them_follows(base, tmp_path):
    settings = {"num_hidden_layers": 5, "hidden_size": 60, "num_attention_heads": 10}
    init(base, tmp_path / "wide", mixer="supra", settings=settings)
    model = loaded(tmp_path / "wide")
    config = model.config
    assert len(model.model.layers) == len(config.layer_types) == len(config.no_rope_layers) == 5
    assert model.model.layers[4].self_attn.head_dim == 6 and config.intermediate_size == 80
    settings = {"n_layer": 1, "num_attention_heads": 4}  # a family's own name, and the shared one
    tiny_checkpoint(tmp_path / "gpt2", "gpt2")
    model = read_like(str(tmp_path / "gpt2"), None, settings, None)
    assert (model.config.n_layer, model.config.n_head) == (1, 4)
    tiny_checkpoint(tmp_path / "llama")
    for settings, size in (({"hidden_size": 24}, 4), ({"hidden_size": 24, "head_dim": 8}, 8)):
        assert read_like(str(tmp_path / "llama"), None, settings, None).config.head_dim == size


def test_a_config_file_and_a_tokenizer_make_a_model(tmp_path):
    """The vocabulary and the special tokens are the tokenizer's."""
    tokenizer = tiny_tokenizer(tmp_path / "words", "<bos> $A")
    file = tmp_path / "small.yaml"
    file.write_text("model_type: llama\nhidden_size: 32\nintermediate_size: 48\n"
                    "num_attention_heads: 4\nnum_hidden_layers: 2\nbos_token_id: 7\n"
                    "rms_norm_eps: 1e-5\n")  # fmt: skip
    settings = {"mixer": "gated_deltanet", "settings": {"pad_token_id": None}}
    report = init(file, tmp_path / "new", tokenizer=tmp_path / "words", **settings)
    config = loaded(tmp_path / "new").config
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.pad_token_id) == (tokenizer.bos_token_id, None)
    assert config.head_dim == 8 and config.rms_norm_eps == 1e-5
    text = "The river rises"
    again = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert again(text).input_ids == tokenizer(text).input_ids
    assert "--like small.yaml --tokenizer words --set pad_token_id=null" in report.command
    assert str(tmp_path) not in report.command


def test_the_report_the_card_and_the_checksums(base, tmp_path):
    report = init(base, tmp_path / "m", mixer="mamba2", keep_attention=0.3)
    assert {x.fate for x in report.tensors} == {"new"} and not report.teacher
    lines = report.lines()
    assert lines[0].startswith("untrained (smollm3): layer 0 mamba2, layer 1 softmax")
    assert not any("copied" in line for line in lines)
    stored = json.loads((tmp_path / "m" / "conversion.json").read_text())
    assert verify(tmp_path / "m") == len(report.tensors) == len(stored["tensors"])
    card = read_card(tmp_path / "m" / "README.md")
    assert "random weights" in card.text and report.command in card.text
    assert card.data.base_model is None
    assert not (tmp_path / "m" / "generation_config.json").exists()


def test_mistakes_leave_nothing_behind(base, tmp_path):
    new = tmp_path / "new"
    fails("did you mean 'num_hidden_layers'", base, new, settings={"num_hidden_layer": 2})
    fails("num_hidden_layers", base, new, settings={"num_hidden_layers": "many"})
    fails("field of a smollm3 config", base, new, settings={"model_type": "llama"})
    fails("multiple of", base, new, settings={"num_key_value_heads": 4})
    fails("nothing is converted", base, new, keep_attention="auto:0.5")
    fails("layers 0 to 1", base, new, keep_attention=[2], settings={"num_hidden_layers": 2})
    fails("must divide", base, new, mixer="h3", options={"head_size": 3})
    fails("tokenizer has words", base, new, settings={"vocab_size": 10})
    fails("cannot be read", tmp_path / "none.json", new)
    for name, text in (("list", "[1]"), ("kind", "a: 1"), ("rnn", "model_type: supra")):
        (tmp_path / f"{name}.yaml").write_text(text)
    fails("with a model_type", tmp_path / "list.yaml", new)
    fails("with a model_type", tmp_path / "kind.yaml", new)
    fails("was converted from", tmp_path / "rnn.yaml", new)
    (tmp_path / "kind.yaml").write_text("model_type: llama")
    fails("without a tokenizer", tmp_path / "kind.yaml", new)
    assert not list(tmp_path.glob("*new*"))


def test_uptraining_pretrains_it(base, tmp_path):
    """The recipe `pretrain`: the loss falls from that of a uniform guess, and the result loads."""
    init(base, tmp_path / "new", mixer="h3", options={"d_state": 2}, keep_attention=[1])
    text = "the river runs to the sea and the bridge stands. "
    rows = [{"text": text * (3 + number % 4)} for number in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(
        "pretrain",
        [
            f"student={tmp_path / 'new'}", f"out={tmp_path / 'run'}",
            f"data.path={tmp_path / 'text.jsonl'}", "data.sequence_length=32",
            "data.eval_documents=4", "budget.tokens=1280", "batch.size=4", "batch.accumulation=1",
            "tune.optimizer.lr=1e-2", "precision=fp32", "eval.every=0",
        ],
    )  # fmt: skip
    assert supra.uptrain.train(config)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert losses[0] > math.log(300)
    assert losses[-1] < losses[0] / 2
    final = tmp_path / "run" / "final"
    assert loaded(final)(torch.tensor([[3, 1, 4]])).logits.isfinite().all()
    card = read_card(final / "README.md")
    assert "Trained on 1,280 tokens" in card.text and "random weights" in card.text
    assert verify(final)
