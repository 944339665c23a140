"""Nothing that a checkpoint's author wrote into it runs code or leads out of its folder."""

import json
import os
import pickle
import shutil
from pathlib import Path

import accelerate.utils
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from supra.checkpoint.opening import find_checkpoint
from supra.cli import main
from supra.conversion.convert import convert
from supra.errors import UserError
from supra.model.configuration import AUTO_MAP
from supra.serving.http import serve
from supra.testing import tiny_checkpoint
from supra.uptrain import tree
from supra.uptrain.models import export, load_student

SECRET = "the secret of another folder"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrusted") / "base"
    tiny_checkpoint(folder)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """A copy of the checkpoint, which a test may change."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def edit(file, **fields):
    """Set fields of a JSON file."""
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | fields))


@pytest.fixture
def ran(tmp_path):
    """A function that says which of the planted modules have run."""
    mark = tmp_path / "ran"
    return lambda: mark.read_text().split() if mark.exists() else []


def plant(folder):
    """Put code in every place from which transformers can be made to run it."""
    mark = folder.parent / "ran"
    for name in ("tokenization_foreign", "tokenizer_foreign", "modeling_foreign", "LICENSE"):
        (folder / f"{name}.py").write_text(
            f"with open({str(mark)!r}, 'a') as file:\n    print({name!r}, file=file)\n"
            "import transformers\n"
            "class Config(transformers.LlamaConfig): pass\n"
            "class Model(transformers.LlamaForCausalLM): config_class = Config\n"
            "class Tokenizer(transformers.PreTrainedTokenizerFast): pass\n"
            "class Pipe(transformers.TextGenerationPipeline): pass\n"
            "def generate(model, input_ids, **_): return input_ids\n"
        )
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "LICENSE.py", folder / "custom_generate" / "generate.py")
    model = {
        "AutoConfig": "modeling_foreign.Config",
        "AutoModelForCausalLM": "modeling_foreign.Model",
    }
    names = {"auto_map": model, "custom_pipelines": {"text-generation": {"impl": "LICENSE.Pipe"}}}
    edit(folder / "config.json", **names, inner_config={"deeper": [names]})
    tokenizer = {"AutoTokenizer": ["tokenization_foreign.Tokenizer", "tokenizer_foreign.Tokenizer"]}
    edit(folder / "tokenizer_config.json", auto_map=tokenizer)
    for name in ("generation", "processor", "preprocessor"):
        edit(folder / f"{name}_config.json", auto_map=tokenizer | model)


def load_with_remote_code(folder, monkeypatch):
    """As lm-evaluation-harness does with trust_remote_code=True, without importing supra."""
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "supra", raising=False)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    generate = pipeline(
        "text-generation", model=str(folder), tokenizer=str(folder), trust_remote_code=True
    )
    generate("The river", max_new_tokens=2)
    return config, model, tokenizer


def no_code_in(folder):
    assert [file.name for file in folder.rglob("*.py")] == ["modeling_supra.py"]
    for file in folder.rglob("*.json"):
        assert "foreign" not in file.read_text(), file.name
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_no_code_of_the_source_comes_along(folder, tmp_path, ran, monkeypatch, capsys):
    plant(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    convert(folder, tmp_path / "rnn", mixer="supra")
    assert ran() == []
    printed = capsys.readouterr().out
    assert "tokenizer_config.json named code to run: the copy does not name it" in printed
    no_code_in(tmp_path / "rnn")
    config, model, tokenizer = load_with_remote_code(tmp_path / "rnn", monkeypatch)
    assert ran() == []
    assert type(model).__name__ == "SupraLlamaForCausalLM" and config.auto_map == AUTO_MAP
    assert set(tokenizer.chat_template) == {"tool"}
    model.save_pretrained(tmp_path / "saved")
    no_code_in(tmp_path / "saved")
    load_with_remote_code(folder, monkeypatch)  # the planted code does run where it is allowed to
    assert {*ran()} == {"LICENSE", "modeling_foreign", "tokenizer_foreign"}


def test_no_code_of_the_student_is_exported(base, tmp_path, ran, monkeypatch):
    """Also if someone else changed the converted model."""
    convert(base, tmp_path / "rnn", mixer="supra")
    plant(tmp_path / "rnn")
    settings = {"student": str(tmp_path / "rnn"), "data": {"path": "x"}, "out": "y"}
    config = tree.build(settings | {"budget": {"tokens": 1}, "tune": {}})
    state = load_student(config).state_dict()
    tokenizer = find_checkpoint(config.student).tokenizer()
    (tmp_path / "final").mkdir()
    export(config, state, tokenizer, tmp_path / "final")
    no_code_in(tmp_path / "final")
    load_with_remote_code(tmp_path / "final", monkeypatch)
    assert ran() == []


def foreign_model(folder):
    names = {
        "AutoConfig": "modeling_foreign.Config",
        "AutoModelForCausalLM": "modeling_foreign.Model",
    }
    edit(folder / "config.json", model_type="foreign", auto_map=names)
    return "needs code of the checkpoint, which supra does not run: use a model of a family"


def foreign_tokenizer(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="ForeignTokenizer")
    edit(folder / "config.json", model_type="arcee")  # a family without a tokenizer of its own
    return "needs code of the checkpoint, which supra does not run: if the folder has"


def hub_kernel(folder):
    edit(folder / "config.json", auto_map={}, inner=[{"_attn_implementation": "someone/kernel"}])
    return "asks for the kernel 'someone/kernel'"


COMMANDS = {
    "inspect": "inspect {model}",
    "convert": "convert --model {model} --out {out}",
    "generate": "generate --model {model} --prompt river",
    "eval": "eval text --model {model} --text {text} --sequence-length 8",
    "ablate": "eval ablate --model {model} --text {text} --parts samples",
    "task": "eval task --model {model} --task induction",
    "teacher": "eval ablate --model {base} --text {text} --parts layers --teacher {model}",
    "diagnose": "diagnose {model} --text {text} --to 64 --trained-length 16",
    "uptrain": "uptrain --config {config} student={model} data.path={text} out={out}",
}
OPEN_THE_TOKENIZER = ("generate", "eval", "ablate", "task", "diagnose", "uptrain")


def text(where):
    """A file of some documents."""
    line = json.dumps({"text": "The river rises in the hills. " * 40})
    (where / "text.jsonl").write_text(f"{line}\n" * 5)
    return where / "text.jsonl"


def fails(command, capsys, **names):
    """The one line that a command prints before it ends with exit code 2."""
    config = Path(__file__).parents[2] / "recipes" / "configs" / "smoke.yaml"
    with pytest.raises(SystemExit) as end:
        main(COMMANDS[command].format(config=config, **names).split())
    assert end.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    return next(line for line in errors if line.startswith("supra: error: "))


@pytest.mark.parametrize(
    ("command", "change"),
    [(x, change) for x in COMMANDS for change in (foreign_model, hub_kernel)]
    + [(x, foreign_tokenizer) for x in OPEN_THE_TOKENIZER],
)
def test_no_command_asks_whether_to_run_code(
    base, folder, tmp_path, ran, capsys, monkeypatch, command, change
):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    plant(folder)
    expected = change(folder)
    names = {"model": folder, "base": base, "text": text(tmp_path), "out": tmp_path / "out"}
    assert expected in fails(command, capsys, **names)
    assert ran() == []


def test_the_way_out_of_a_tokenizers_code_works(folder, ran):
    plant(folder)
    foreign_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    del fields["auto_map"], fields["tokenizer_class"]
    file.write_text(json.dumps(fields))
    assert find_checkpoint(str(folder)).tokenizer()("The river").input_ids
    assert ran() == []


def link(name):
    def change(folder, outside):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)
        return f"{name} in model is a link that leads out of the folder"

    return change


def shards(name):
    """An index whose tensors are all in a file of that name."""

    def change(folder, outside):
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(outside.parent / "elsewhere.safetensors")
        place = name.format(outside.parent)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        (folder / INDEX).write_text(json.dumps(index))
        return f"{INDEX} of model names {place!r}, which is not a file of that folder"

    return change


def shard_link(folder, outside):
    shards("part.safetensors")(folder, outside)
    (folder / "part.safetensors").symlink_to(outside.parent / "elsewhere.safetensors")
    return "part.safetensors in model is a link that leads out of the folder"


def templates_link(folder, outside):
    (folder / "additional_chat_templates").symlink_to(outside.parent)
    return "additional_chat_templates in model is a link that leads out of the folder"


def chain(folder, outside):
    """A link to a link."""
    (folder / "second").symlink_to(outside)
    return link("generation_config.json")(folder, Path("second"))


def loop(folder, outside):
    (folder / "vocab.txt").symlink_to("vocab.txt")
    return "vocab.txt in model is a link to a file that does not exist"


def gone(folder, outside):
    (folder / "vocab.txt").symlink_to("other.txt")
    return "vocab.txt in model is a link to a file that does not exist"


def config_field(file, **fields):
    def change(folder, outside):
        edit(folder / file, **fields)
        return (
            "file of weights (transformers_weights)" if file == "config.json" else "not a file of"
        )

    return change


@pytest.mark.parametrize(
    "change",
    [
        *map(link, ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")),
        *map(link, ("generation_config.json", "chat_template.jinja", "model.safetensors")),
        *map(link, ("adapter_config.json", "special_tokens_map.json", INDEX)),
        *map(shards, ("../elsewhere.safetensors", "{}/elsewhere.safetensors")),
        *(shard_link, templates_link, chain, loop, gone),
        config_field("config.json", transformers_weights="../elsewhere.safetensors"),
        config_field("tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"]),
    ],
)
def test_nothing_outside_the_folder_is_read(folder, tmp_path, change):
    (tmp_path / "outside").mkdir()
    outside = tmp_path / "outside" / "file.jinja"
    outside.write_text(json.dumps({"model_type": "llama", "text": SECRET}))
    message = change(folder, outside)
    checkpoint = find_checkpoint(str(folder))
    for use in (lambda: convert(folder, tmp_path / "rnn", mixer="supra"), checkpoint.model):
        with pytest.raises(UserError) as error:
            use()
        assert message in str(error.value) and SECRET not in str(error.value)
    assert not (tmp_path / "rnn").exists()


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "NOTICE.md", "README.md"])
def test_what_goes_along_is_left_out_where_it_lies_elsewhere(folder, tmp_path, capsys, name):
    """A bad licence or card does not stop a conversion, and cannot bring in another file."""
    (tmp_path / "outside").write_text(SECRET)
    (folder / name).symlink_to("../outside")
    convert(folder, tmp_path / "rnn", mixer="supra")
    AutoModelForCausalLM.from_pretrained(tmp_path / "rnn").save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "rnn", tmp_path / "saved"):
        assert not any(SECRET.encode() in x.read_bytes() for x in file.iterdir())
    assert f"{name} is " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "NOTICE.md"])
def test_a_licence_that_may_not_be_read_is_left_out(folder, tmp_path, capsys, monkeypatch, name):
    (folder / name).write_text("MIT License")
    open_any = open

    def open_others(path, *rest, **given):  # root may read everything
        if str(path) == str(folder / name):
            raise PermissionError(13, "Permission denied", str(path))
        return open_any(path, *rest, **given)

    monkeypatch.setattr("builtins.open", open_others)
    monkeypatch.setattr("io.open", open_others)
    convert(folder, tmp_path / "rnn", mixer="supra")
    assert (tmp_path / "rnn" / "config.json").is_file()
    assert not (tmp_path / "rnn" / name).exists()
    assert f"{name} of model may not be read: not copied" in capsys.readouterr().out


def hub_cache(base, where, shared):
    """The checkpoint in the layout of a hub cache: links into blobs, possibly shared by models."""
    snapshot = where / "hub" / "models--valley--river" / "snapshots" / "0a1b"
    blobs = snapshot.parents[1] / "blobs"
    for place in (snapshot, blobs, where / "hub" / "blobs" / "0c"):
        place.mkdir(parents=True)
    for number, file in enumerate(base.iterdir()):
        blob = blobs / str(number)
        if shared:
            (where / "hub" / "blobs" / "0c" / str(number)).write_bytes(file.read_bytes())
            blob.symlink_to(f"../../blobs/0c/{number}")
        else:
            blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def linked_folder(base, where):
    (where / "mine").symlink_to(base)
    return where / "mine"


@pytest.mark.parametrize("way", ["cache", "shared cache", "linked folder"])
def test_links_that_stay_inside_work(base, tmp_path, way):
    if way == "linked folder":
        model = linked_folder(base, tmp_path)
    else:
        model = hub_cache(base, tmp_path, shared=way == "shared cache")
    convert(model, tmp_path / "rnn", mixer="supra")
    assert (tmp_path / "rnn" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()
    checkpoint = find_checkpoint(str(model))
    assert checkpoint.model().num_parameters() and checkpoint.tokenizer().vocab_size


class Bomb:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def pickled(folder, mark):
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin", "holds no safetensors weights: pickled weights"


def pickled_adapter(folder, mark):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return folder / "adapter_model.bin", "pickled weights (adapter_model.bin), which are not opened"


@pytest.mark.parametrize("change", [pickled, pickled_adapter])
@pytest.mark.parametrize("command", ["convert", "generate", "eval", "uptrain"])
def test_no_command_opens_a_pickle(base, folder, tmp_path, capsys, command, change):
    file, message = change(folder, tmp_path / "ran")
    torch.save(load_file(base / "model.safetensors"), file)
    names = {"model": folder, "text": text(tmp_path), "out": tmp_path / "out"}
    assert message in fails(command, capsys, **names)


def test_a_server_opens_none_either(folder, tmp_path):
    pytest.importorskip("transformers.cli.serving.model_manager", reason="the extra serve")
    _, message = pickled(folder, tmp_path / "ran")
    with pytest.raises(UserError, match=message):
        serve(str(folder), [])


def test_the_states_of_a_run_are_loaded_without_objects(tmp_path):
    """accelerate loads them with `weights_only`, in one process."""
    torch.save({"random_state": Bomb(tmp_path / "ran")}, tmp_path / "random_states_0.pkl")
    with pytest.raises(pickle.UnpicklingError):
        accelerate.utils.load(tmp_path / "random_states_0.pkl")
    assert not (tmp_path / "ran").exists()


def test_of_a_folder_with_both_the_safetensors_are_taken(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    save_file(
        {n: x + 1 for n, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    weights = find_checkpoint(str(folder)).model().state_dict()
    assert all(torch.equal(weights[name], x + 1) for name, x in tensors.items())
    assert not (tmp_path / "ran").exists()
