"""Conversion accounts for every tensor, and leaves a complete folder or none."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import supra.checkpoint.files
import supra.checkpoint.weights
from supra.checkpoint.opening import find_checkpoint
from supra.checkpoint.shard_writer import ShardWriter
from supra.checkpoint.weights import INDEX, FolderReader
from supra.cli.app import app
from supra.conversion.convert import convert
from supra.conversion.inspection import inspect_model
from supra.errors import UserError
from supra.export.qwen3_5 import obstacles
from supra.mixers import DEFAULT_MIXER
from supra.mixers.supra import lightning_slopes
from supra.model.original import original
from supra.states import save_state
from supra.testing import MAIN_FAMILIES, tiny_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_checkpoint(folder, num_hidden_layers=3)
    return folder


def tensors_of(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_every_tensor_is_accounted_for(family, tmp_path):
    """The report, the files and the model agree, and inherited tensors keep their values."""
    teacher = tiny_checkpoint(tmp_path / "base", family)
    report = convert(str(tmp_path / "base"), tmp_path / "rnn", mixer="supra")
    fates = {tensor.name: tensor for tensor in report.tensors}
    stored = tensors_of(tmp_path / "rnn")
    assert {n for n, x in fates.items() if x.fate != "dropped"} == set(stored)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(stored.pop(name), tensor), name
    assert stored
    assert all(".mixer." in n and fates[n].fate == "new" for n in stored)
    assert json.loads((tmp_path / "rnn" / "conversion.json").read_text())["family"] == family


def test_old_names_are_renamed(tmp_path):
    """GPT-NeoX checkpoints call the head embed_out, and carry buffers that no model has."""
    tiny_checkpoint(tmp_path / "base", "gpt_neox")
    tensors = tensors_of(tmp_path / "base")
    assert "embed_out.weight" in tensors
    buffer = "gpt_neox.layers.0.attention.masked_bias"
    save_file(tensors | {buffer: torch.zeros(1)}, tmp_path / "base" / "model.safetensors")
    report = convert(str(tmp_path / "base"), tmp_path / "rnn", mixer="supra")
    fates = {tensor.name: tensor for tensor in report.tensors}
    assert fates["lm_head.weight"].fate == "transformed"
    assert fates["lm_head.weight"].note == "renamed from embed_out.weight"
    assert fates[buffer].fate == "dropped"


def test_tied_embeddings_are_stored_once(tmp_path):
    teacher = tiny_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    tensors = tensors_of(tmp_path / "base")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | head, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    report = convert(str(tmp_path / "base"), tmp_path / "rnn", mixer="softmax")
    dropped = [tensor for tensor in report.tensors if tensor.fate == "dropped"]
    assert [x.note for x in dropped] == ["tied to model.embed_tokens.weight"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn").eval()
    tokens = torch.arange(20)[None]
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)


def test_a_head_that_is_tied_in_name_only_is_not_lost(tmp_path):
    tiny_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    tensors = tensors_of(tmp_path / "base")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    save_file(tensors | head, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    fails("set tie_word_embeddings to false", tmp_path / "base", tmp_path / "rnn")


def test_fixed_decay_stays_fixed_after_loading(base, tmp_path):
    convert(str(base), tmp_path / "rnn", mixer="supra_paper")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("feature_map" in name for name in trained)
    assert not any("log_slope" in name for name in trained)
    slopes = model.model.layers[0].self_attn.mixer.log_slope
    torch.testing.assert_close(slopes, lightning_slopes(6).log())


def test_shards_and_index(base, tmp_path):
    convert(str(base), tmp_path / "one", mixer="supra")
    convert(str(base), tmp_path / "many", mixer="supra", shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in one.values())
    assert all(torch.equal(one[name], many[name]) for name in one)
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_dtype_casts_what_is_inherited(base, tmp_path):
    report = convert(str(base), tmp_path / "rnn", mixer="supra", dtype=torch.bfloat16)
    dtypes = {".mixer." in name: x.dtype for name, x in tensors_of(tmp_path / "rnn").items()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    assert {x.fate for x in report.tensors} == {"transformed", "new"}
    assert AutoConfig.from_pretrained(tmp_path / "rnn").dtype == torch.bfloat16


def test_keep_attention(base, tmp_path):
    report = convert(str(base), tmp_path / "rnn", mixer="supra", keep_attention=[0, -1])
    assert report.layers == ["softmax", "supra", "softmax"]
    assert not any("layers.0" in n and ".mixer." in n for n in tensors_of(tmp_path / "rnn"))


def test_the_default_mixer(base, tmp_path):
    """It is the one that the help names, and other engines run it."""
    report = convert(base, tmp_path / "rnn")
    assert set(report.layers) == {DEFAULT_MIXER}
    assert not obstacles(AutoConfig.from_pretrained(tmp_path / "rnn"))
    for name in ("convert", "plan"):
        options = {x.name: x.help for x in typer.main.get_command(app).commands[name].params}
        assert f"Default: {DEFAULT_MIXER}" in options["mixer"]


@torch.no_grad()
def test_kept_attention_without_positions(base, tmp_path):
    """It computes the same wherever a text begins, decodes, and is written down."""
    arguments = {"mixer": "rwkv", "options": {"rotary": False}, "keep_attention": [1]}
    report = convert(base, tmp_path / "rnn", attention_positions="none", **arguments)
    assert report.options["softmax"] == {"rotary": False}
    assert "--keep-attention 1 --attention-positions none" in report.command
    assert "`softmax`: rotary False" in (tmp_path / "rnn" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn").eval()
    assert "softmax:    rotary=False" in inspect_model(model.config, [16]).lines()
    tokens = torch.arange(3, 33)[None]
    logits = model(tokens).logits
    later = model(tokens, position_ids=torch.arange(500, 530)[None]).logits
    torch.testing.assert_close(later, logits, atol=0, rtol=0)
    with_cache = model(tokens[:, :20], use_cache=True)
    rest = model(tokens[:, 20:], past_key_values=with_cache.past_key_values).logits
    torch.testing.assert_close(rest, logits[:, 20:], atol=1e-4, rtol=1e-4)
    padded = model(
        torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], 1),
        attention_mask=(torch.arange(35) >= 5)[None].long(),
    ).logits[:, 5:]
    torch.testing.assert_close(padded, logits, atol=1e-4, rtol=1e-4)
    convert(base, tmp_path / "rope", **arguments)
    rope = AutoModelForCausalLM.from_pretrained(tmp_path / "rope").eval()
    assert (rope(tokens).logits - logits).abs().max() > 1e-2


def test_the_teacher_inside_has_positions_where_kept_attention_has_none(base, tmp_path):
    arguments = {"mixer": "rwkv", "keep_attention": [1], "attention_positions": "none"}
    convert(base, tmp_path / "rnn", **arguments)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn").eval()
    teacher, pairs = original(model)
    tokens = torch.arange(3, 33)[None]
    expected = AutoModelForCausalLM.from_pretrained(base).model(tokens).last_hidden_state
    torch.testing.assert_close(teacher(tokens).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert [attention.mixer.name for attention, _ in pairs] == ["rwkv", "softmax", "rwkv"]


@pytest.mark.parametrize(
    ("family", "arguments", "says"),
    [
        ("llama", {}, r"attention_positions \(='none'\) .* give keep_attention"),
        ("gpt2", {"keep_attention": [1]}, "'gpt2' has no rotary positions"),
        ("deepseek_v3", {"keep_attention": [1]}, "'deepseek_v3' has no rotary positions that can"),
    ],
)
def test_attention_positions_that_cannot_be_left_out(family, arguments, says, tmp_path):
    tiny_checkpoint(tmp_path / "base", family)
    with pytest.raises(UserError, match=says):
        convert(tmp_path / "base", tmp_path / "rnn", attention_positions="none", **arguments)
    assert not (tmp_path / "rnn").exists()


def test_a_share_keeps_attention_evenly(base, tmp_path):
    report = convert(str(base), tmp_path / "rnn", mixer="supra", keep_attention=0.3)
    assert report.layers == ["supra", "softmax", "supra"]
    assert "--keep-attention 1 " in report.command
    assert report.layer_costs == []


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    sentence = "The river rises in the hills and runs south through the valley. "
    file.write_text(json.dumps({"text": sentence * 100, "title": sentence * 99}) + "\n")
    return str(file)


def test_auto_keeps_the_costliest(tmp_path, text):
    """A layer whose attention adds nothing costs nothing and is converted first. The layer with the
    largest output keeps attention."""
    teacher = tiny_checkpoint(tmp_path / "base", num_hidden_layers=3)
    for layer, scale in zip(teacher.model.layers, (0.02, 0, 4), strict=True):
        layer.self_attn.o_proj.weight.data *= scale
    teacher.save_pretrained(tmp_path / "base")
    few, many = (
        convert(
            tmp_path / "base",
            tmp_path / name,
            mixer="supra",
            keep_attention=f"auto:{share}",
            text=text,
        )
        for name, share in (("few", 0.3), ("many", "67%"))
    )
    assert few.layers == ["supra", "supra", "softmax"]
    assert many.layers == ["softmax", "supra", "softmax"]
    quiet, silent, loud = few.layer_costs
    assert silent == 0 < quiet < loud
    assert many.layer_costs == few.layer_costs
    table = [line.split() for line in few.lines() if line.split()[0] in "012"]
    assert table == [
        ["0", f"{quiet:.6f}", "supra"],
        ["1", "0.000000", "supra"],
        ["2", f"{loud:.6f}", "kept"],
    ]
    written = json.loads((tmp_path / "few" / "conversion.json").read_text())
    assert written["layer_costs"] == few.layer_costs


@pytest.mark.parametrize("rule", ["auto", "greedy"])
def test_rules_only_choose_layers(base, tmp_path, text, rule):
    """Naming the chosen layers, as the report's command does, writes the same files."""
    chosen = {"keep_attention": f"{rule}:0.3", "text": text}
    report = convert(base, tmp_path / rule, mixer="supra", **chosen)
    (kept,) = [layer for layer, name in enumerate(report.layers) if name == "softmax"]
    assert f"--keep-attention {kept} " in report.command
    convert(base, tmp_path / "named", mixer="supra", keep_attention=[kept])
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / rule / name).read_bytes() == (tmp_path / "named" / name).read_bytes()


def test_auto_reads_another_field(base, tmp_path, text):
    arguments = {"keep_attention": "auto:0.3", "text": text}
    fails("its fields are text, title", base, tmp_path / "x", text_field="body", **arguments)
    report = convert(base, tmp_path / "rnn", text_field="title", **arguments)
    assert len(report.layer_costs) == 3


def test_auto_needs_a_tokenizer_and_text(base, broken, tmp_path, text):
    out = tmp_path / "rnn"
    fails("does not load", broken, out, keep_attention="auto:0.3", text=text)
    fails("needs a text", base, out, keep_attention="auto:0.3")
    fails(
        "only used when keep_attention is auto or greedy", base, out, keep_attention=0.3, text=text
    )
    fails("between 0 and 1", base, out, keep_attention=1.0)


@pytest.mark.parametrize("typed", ["{base}", "{base}/", "."])
def test_the_report_names_no_folder_above_the_teacher(base, tmp_path, typed, monkeypatch):
    monkeypatch.chdir(base)
    report = convert(typed.format(base=base), tmp_path / "rnn", mixer="supra")
    assert report.teacher == base.name
    assert f"--model {base.name} --out ./rnn" in report.command
    for file in (tmp_path / "rnn").iterdir():
        assert str(base.parent).encode() not in file.read_bytes(), file.name


def test_options_reach_the_config(base, tmp_path):
    convert(str(base), tmp_path / "rnn", mixer="supra_paper", options={"scale": True})
    plan = AutoConfig.from_pretrained(tmp_path / "rnn").supra
    options = plan["options"]["supra"]
    assert options["feature_map"] == "mixed_relu"
    assert options["decay"] == "fixed"
    assert options["scale"] is True


def test_random_starting_values_follow_the_seed(base, tmp_path):
    for folder, seed in [("a", 0), ("b", 0), ("c", 1)]:
        convert(str(base), tmp_path / folder, mixer="supra_paper", seed=seed)
    a, b, c = (tensors_of(tmp_path / folder) for folder in "abc")
    name = "model.layers.1.self_attn.mixer.feature_map.query_weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], c[name])


@pytest.fixture
def broken(base, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    folder = tmp_path / "broken"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="40KB")
    return folder


def fails(match, model, out, **arguments):
    """Conversion fails with that message and leaves no new file."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=match):
        convert(str(model), out, **arguments)
    assert sorted(out.parent.iterdir()) == before


def as_folder(shard):
    shard.unlink()
    shard.mkdir()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda shard: shard.unlink(), "is missing"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-100]), "is truncated"),
        (lambda shard: shard.write_bytes(b""), "is truncated"),
        (lambda shard: shard.write_bytes(bytes(range(256))), "is truncated"),
        (as_folder, "cannot be read"),
    ],
)
def test_a_damaged_shard(broken, tmp_path, damage, says):
    shard = sorted(broken.glob("*.safetensors"))[1]
    damage(shard)
    message = f"shard {shard.name} {says}"
    fails(message, broken, tmp_path / "rnn")
    with pytest.raises(UserError, match=message):
        find_checkpoint(str(broken)).model()


def test_a_tensor_that_its_shard_lacks(broken, tmp_path):
    index = broken / INDEX
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))
    content["weight_map"]["model.norm.weight"] = next(
        name for name in names if name != content["weight_map"]["model.norm.weight"]
    )
    index.write_text(json.dumps(content))
    fails("not what the index says", broken, tmp_path / "rnn")


@pytest.mark.parametrize("arguments", [{"shard_bytes": 0.0}, {"shard_bytes": float("nan")}])
def test_shard_size(base, tmp_path, arguments):
    fails("must be positive", base, tmp_path / "rnn", **arguments)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "null", "[]", "[" * 100_000, "\0\1\2", '{"metadata": {}}'),
        *('{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {}}'),
        *(f'{{"weight_map": {{"a": {name}}}}}' for name in ("7", "null", '["b"]', '""', '"."')),
        *(f'{{"weight_map": {{"a": {name}}}}}' for name in ('"config.json"', '"a.bin"', '"a/.."')),
    ],
)
def test_a_damaged_index(broken, tmp_path, content):
    (broken / INDEX).write_text(content)
    fails(INDEX, broken, tmp_path / "rnn")
    with pytest.raises(UserError, match=INDEX):
        find_checkpoint(str(broken)).model()


def test_a_folder_with_a_single_file_and_an_index(base, broken, tmp_path):
    """The single file is read, as in transformers."""
    tensors = tensors_of(base)
    tensors["model.norm.weight"] += 1
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    convert(broken, tmp_path / "rnn", mixer="supra")
    loaded = find_checkpoint(str(broken)).model().state_dict()
    for name, found in tensors_of(tmp_path / "rnn").items():
        if name in tensors:
            assert torch.equal(found, tensors[name]) and torch.equal(loaded[name], tensors[name])


def test_missing_tensor(broken, tmp_path):
    index = broken / INDEX
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    fails("1 tensors are missing .* first model.norm.weight", broken, tmp_path / "rnn")


def test_another_models_config(broken, tmp_path):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    fails("weights and config do not belong together", broken, tmp_path / "rnn")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"vocab_size": 10**8}, "weight has shape .* but its config says .*100000000"),
        ({"intermediate_size": 10**8}, "weight has shape .* but its config says .*100000000"),
        ({"head_dim": 10**6}, "weight has shape .* but its config says .*2000000"),
        ({"num_hidden_layers": 40}, "missing keys .* first model.layers.10.input_layernorm"),
        ({"moe_intermediate_size": 10**7}, "experts.* its parts have"),
    ],
)
def test_no_memory_is_taken_for_what_a_config_alone_says(
    broken, tmp_path, monkeypatch, fields, says
):
    if "moe_intermediate_size" in fields:
        broken = tmp_path / "experts"
        tiny_checkpoint(broken, "qwen3_moe")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | fields))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(UserError, match=says):
        find_checkpoint(str(broken)).model()


def test_words_beyond_the_models_vocabulary(base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    fields = json.loads((folder / "tokenizer.json").read_text())
    words = fields["model"]["vocab"]
    fields["added_tokens"].append(fields["added_tokens"][0] | {"content": "<image>", "id": 5000})
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    convert(folder, tmp_path / "gemma", mixer="supra")  # an added token may be another model's
    words[max(words, key=words.get)] = 4999
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    fails("words up to number 4999, and the model's vocab_size is 300", folder, tmp_path / "rnn")
    with pytest.raises(UserError, match="words up to number 4999"):
        find_checkpoint(str(folder)).tokenizer()


def test_damaged_config(broken, tmp_path):
    (broken / "config.json").write_text("{")
    fails("config.json is damaged", broken, tmp_path / "rnn")


def test_pickled_weights_are_not_opened(base, tmp_path):
    model = tmp_path / "pickled"
    model.mkdir()
    (model / "config.json").write_bytes((base / "config.json").read_bytes())
    (model / "pytorch_model.bin").write_bytes(b"0")
    fails("no safetensors weights", model, tmp_path / "rnn")


@pytest.mark.parametrize("family", ["bert", "t5", "mamba", "bloom", "gemma3", "qwen3_next"])
def test_unsupported_family(family, tmp_path):
    """Encoder, encoder-decoder, no attention, unsupported attention, several models, a hybrid."""
    AutoConfig.for_model(family).save_pretrained(tmp_path / "model")
    match = f"model_type '{family}' does not convert: .*docs/families.md"
    fails(match, tmp_path / "model", tmp_path / "rnn")


def test_converted_already(base, tmp_path):
    convert(str(base), tmp_path / "rnn", mixer="supra")
    fails("already converted", tmp_path / "rnn", tmp_path / "again")


def test_an_empty_name_is_no_mixer(base, tmp_path):
    fails("mixer ''", base, tmp_path / "rnn", mixer="")


def test_layers_out_of_range(base, tmp_path):
    fails("layer 7: the model has layers 0 to 2", base, tmp_path / "rnn", keep_attention=[7])


def test_occupied_output_folder(base, tmp_path):
    (tmp_path / "rnn").mkdir()
    (tmp_path / "rnn" / "precious").write_text("mine")
    fails("is not empty", base, tmp_path / "rnn")
    assert (tmp_path / "rnn" / "precious").read_text() == "mine"


def test_an_empty_output_folder_is_used(base, tmp_path):
    (tmp_path / "rnn").mkdir()
    convert(str(base), tmp_path / "rnn", mixer="supra")
    assert (tmp_path / "rnn" / "config.json").is_file()


def test_disk_too_small(base, tmp_path, monkeypatch):
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr(supra.checkpoint.files.shutil, "disk_usage", lambda path: free)
    fails("0.0 GB free: make room", base, tmp_path / "rnn")


def test_the_disk_fills_up(base, tmp_path, monkeypatch):
    """The second shard does not fit: no file is left."""
    add, places = ShardWriter.add, set()

    def full(self, name, tensor):
        places.add(self._places[name][0])
        if len(places) > 1:
            raise OSError(28, "No space left on device")
        add(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(OSError, match="No space left"):
        convert(str(base), tmp_path / "rnn", mixer="supra", shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_leaves_nothing_that_loads(base, tmp_path):
    """SIGKILL while tensors are written; the next conversion cleans up and succeeds."""
    code = f"""
import time
from supra.checkpoint.shard_writer import ShardWriter
add = ShardWriter.add
def slow(self, name, tensor):
    add(self, name, tensor)
    print("writing", flush=True)
    time.sleep(60)
ShardWriter.add = slow
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.conversion.inspection import inspect_model
convert({str(base)!r}, {str(tmp_path / "rnn")!r}, shard_bytes=1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for folder in tmp_path.iterdir():
        assert folder.name != "rnn"
        assert not (folder / "config.json").exists()
    convert(str(base), tmp_path / "rnn", mixer="supra")
    assert [folder.name for folder in tmp_path.iterdir()] == ["rnn"]


def test_only_one_tensor_is_held_at_a_time(tmp_path, monkeypatch):
    """Each tensor is written before the next one is read."""
    tiny_checkpoint(tmp_path / "base")
    order = []
    load, add = FolderReader.load, ShardWriter.add
    monkeypatch.setattr(FolderReader, "load", lambda s, n: (order.append("read"), load(s, n))[1])
    monkeypatch.setattr(ShardWriter, "add", lambda s, n, x: (order.append("write"), add(s, n, x)))
    convert(str(tmp_path / "base"), tmp_path / "rnn", mixer="softmax")
    assert order == ["read", "write"] * (len(order) // 2)
    assert len(order) > 40


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int32, torch.int64])
def test_weights_that_are_no_floats(base, broken, tmp_path, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    for file in broken.glob("*.safetensors"):
        if name in (tensors := load_file(file)):
            save_file(tensors | {name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
    stored = str(dtype).removeprefix("torch.")
    message = f"{name} is stored as {stored}, but the model needs float32"
    fails(message, broken, tmp_path / "rnn")
    with pytest.raises(UserError, match=message):
        find_checkpoint(str(broken)).model()


def test_a_revision_is_of_the_hub(base, tmp_path):
    fails("only for models on the hub", base, tmp_path / "rnn", revision="main")
    (tmp_path / "x.gguf").touch()
    fails("only for models on the hub", tmp_path / "x.gguf", tmp_path / "rnn", revision="main")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"\xff\xfe\x00"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": null}'),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"\xff"),
    ],
)
def test_tokenizers_that_do_not_load(base, tmp_path, name, content):
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(content)
    fails("tokenizer of .* does not load", tmp_path / "model", tmp_path / "rnn")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_follow_the_umask(base, tmp_path, umask):
    before = os.umask(umask)
    try:
        convert(base, tmp_path / "rnn", mixer="supra", shard_bytes=40_000)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn")
        model.save_pretrained(tmp_path / "saved")
        output = model(torch.arange(4)[None], use_cache=True)
        save_state(output.past_key_values, tmp_path / "state.safetensors")
    finally:
        os.umask(before)
    files = [*(tmp_path / "rnn").iterdir(), *(tmp_path / "saved").iterdir()]
    files += [tmp_path / "state.safetensors"]
    assert sum(file.suffix == ".safetensors" for file in files) > 3
    assert {file.name: file.stat().st_mode & 0o777 for file in files} == {
        file.name: 0o666 & ~umask for file in files
    }


def test_a_shard_that_may_not_be_read(base, tmp_path, monkeypatch):
    """safetensors reports such a file as missing."""

    def forbidden(file, framework):
        raise FileNotFoundError(f"No such file or directory: {file}")

    monkeypatch.setattr(supra.checkpoint.weights, "safe_open", forbidden)
    fails("model.safetensors may not be read: permission denied", base, tmp_path / "rnn")
    with pytest.raises(UserError, match="may not be read"):
        find_checkpoint(str(base)).model()
