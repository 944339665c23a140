"""The model card: what conversion and uptraining write, and that it goes where the model goes."""

import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import hub

import supra.conversion.convert
from supra import cli
from supra.checkpoint.card import (
    CARD,
    CARD_BYTES,
    carry_card,
    read_card,
    teacher_metadata,
    update_card,
)
from supra.checkpoint.opening import Checkpoint
from supra.conversion.convert import convert
from supra.evaluate import state_bytes
from supra.testing import tiny_checkpoint

TEACHERS_CARD = """---
license: other
license_name: valley
license_link: https://example.org/valley
language:
- en
- fr
---
# The teacher
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "base"
    tiny_checkpoint(folder, num_hidden_layers=3)
    (folder / CARD).write_text(TEACHERS_CARD)
    return folder


@pytest.fixture(scope="module")
def converted(base):
    folder = base.parent / "rnn"
    convert(str(base), folder, mixer="supra", keep_attention=[1], seed=3)
    return folder


def test_front_matter(converted):
    data = ModelCard.load(converted / CARD).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["supra", "recurrent", "linear-attention"],
        "license": "other",
        "license_name": "valley",
        "license_link": "https://example.org/valley",
        "language": ["en", "fr"],
    }


def test_text(base, converted):
    text = ModelCard.load(converted / CARD).text
    assert text.startswith("\n# base as a recurrent network\n")
    assert "layer 0 supra, layer 1 softmax, layer 2 supra." in text
    assert "Parameters: 82,128 inherited, 1,272 new." in text
    # 2 keys and 2 values of 8 floats and whether the token is padding: 129 bytes, in one layer
    assert "bytes, and 129 more for every token" in text
    assert str(base.parent) not in text, "the user's folders are nobody's business"


def test_a_teacher_from_the_hub_is_linked(base, tmp_path, monkeypatch):
    from_hub = Checkpoint("valley/river-1b", base, hub_id="valley/river-1b", revision="v2")
    monkeypatch.setattr(supra.conversion.convert, "find_checkpoint", lambda *_: from_hub)
    monkeypatch.setattr(Checkpoint, "fetch_weights", lambda _: None)
    convert("valley/river-1b", tmp_path / "rnn", mixer="supra", revision="v2")
    card = ModelCard.load(tmp_path / "rnn" / CARD)
    assert card.data.base_model == "valley/river-1b"
    assert "[valley/river-1b](https://huggingface.co/valley/river-1b)" in card.text
    assert "--model valley/river-1b --revision v2 --out ./rnn --mixer supra" in card.text


def code(text):
    """The code blocks of a card, by language."""
    return dict(re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def test_the_command_writes_the_same_checkpoint(base, converted, tmp_path, monkeypatch):
    command = shlex.split(code(ModelCard.load(converted / CARD).text)[""])
    (tmp_path / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    cli.main(command[1:])
    for file in converted.iterdir():
        assert (tmp_path / "rnn" / file.name).read_bytes() == file.read_bytes() or (
            file.name == "conversion.json"  # names the teacher as the user did
        )


def test_the_code_that_loads_it_runs(converted, monkeypatch, capsys):
    monkeypatch.chdir(converted)
    exec(code(ModelCard.load(CARD).text)["python"], {})
    assert capsys.readouterr().out.startswith("The state is")


def test_the_state_is_what_the_cache_holds(base, tmp_path):
    convert(str(base), tmp_path, mixer="supra")
    text = ModelCard.load(tmp_path / CARD).text
    carried = int(
        re.search(r"state of a sequence has ([\d,]+) bytes, however", text)[1].replace(",", "")
    )
    config = AutoConfig.from_pretrained(tmp_path)
    assert carried == state_bytes(config, 7) == state_bytes(config, 70)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Apache License\n   Version 2.0, January 2004\n", {"license": "apache-2.0"}),
        ("MIT License\n\nCopyright (c) 2024\n", {"license": "mit"}),
        (
            "VALLEY COMMUNITY LICENSE 1.0\n\nTerms\n",
            {
                "license": "other",
                "license_name": "valley-community-license-1.0",
                "license_link": "LICENSE.txt",
            },
        ),
    ],
)
def test_licence_out_of_its_text(base, tmp_path, text, expected):
    """For a teacher without a card, or with a card that names no licence."""
    for file in base.iterdir():
        if file.name != CARD:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "LICENSE.txt").write_text(text)
    convert(str(tmp_path), tmp_path / "rnn", mixer="supra")
    data = ModelCard.load(tmp_path / "rnn" / CARD).data.to_dict()
    assert {name: data[name] for name in data if name.startswith("license")} == expected
    assert (tmp_path / "rnn" / "LICENSE.txt").read_text() == text


def test_uptraining_is_told_once(base, tmp_path):
    convert(str(base), tmp_path, mixer="supra")
    before = ModelCard.load(tmp_path / CARD).text
    for tokens, perplexity in [(7, 9.0), (80_896, 48.0412)]:
        results = {"teacher": {"perplexity": 15.8}, "this model": {"perplexity": perplexity}}
        update_card(tmp_path, tokens=tokens, results=results, datasets=["valley/tales"])
    card = ModelCard.load(tmp_path / CARD)
    assert card.text.startswith(before)
    assert card.text.removeprefix(before) == (
        "\n## Uptraining\n\nTrained on 80,896 tokens of valley/tales.\n\n"
        "|  | perplexity |\n| --- | ---: |\n| teacher | 15.80 |\n| this model | 48.04 |\n"
    )
    assert card.data.datasets == ["valley/tales"] and card.data.license == "other"


def test_a_folder_without_a_card_gets_none(tmp_path):
    update_card(tmp_path, tokens=1, results={})
    assert list(tmp_path.iterdir()) == []


def test_a_saved_model_keeps_its_card(converted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(converted)
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == (converted / CARD).read_text()
    (tmp_path / CARD).write_text("---\ntags:\n- supra\n---\nMine.\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text().endswith("Mine.\n")


class Hub:
    """A hub that takes uploads. It has no card; offline, asking for one finds none."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **_):
        self.repo_id = repo_id
        return self

    def create_commit(self, operations, **_):
        for operation in operations:
            self.files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_an_upload_is_complete(way, converted, tmp_path, monkeypatch):
    """Without supra, transformers would upload a placeholder card, and would not save the shim."""
    monkeypatch.setattr(hub, "_hf_api", remote := Hub())
    monkeypatch.setattr(hub, "hf_api", lambda: remote)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: remote)
    model = AutoModelForCausalLM.from_pretrained(converted)
    if way == "push_to_hub":
        model.push_to_hub("valley/rnn", tags=["tiny"])
    else:
        model.add_model_tags("tiny")
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="valley/rnn")
    assert {*remote.files} >= {"config.json", "model.safetensors", "modeling_supra.py", CARD}
    card = ModelCard(remote.files[CARD].decode())
    assert card.text == ModelCard.load(converted / CARD).text
    assert card.data.tags == ["supra", "recurrent", "linear-attention", "tiny"]
    assert card.data.license_name == "valley"


def front(*lines):
    return "\n".join(("---", *lines, "---", "# The teacher", "")).encode()


# text of the file -> the fields that arrive, and the message
STRANGE_CARDS = {
    "no mapping closed": (front("license: [a"), {}, "without its front matter"),
    "a tab": (front("license:\tmit", "\t- x"), {}, "without its front matter"),
    "a list": (front("- license", "- mit"), {}, "without its front matter"),
    "a text": (front("license"), {}, "without its front matter"),
    "a number": (front("5"), {}, "without its front matter"),
    "null": (front("null"), {}, None),
    "nothing": (front(), {}, None),
    "no end": (b"---\nlicense: mit\n", {}, None),
    "two documents": (front("license: mit", "--- {}"), {}, "without its front matter"),
    "a program": (front("license: !!python/object/apply:os.getcwd []"), {}, "without its front"),
    "deep": (front("a: " + "[" * 400 + "]" * 400), {}, "without its front matter"),
    "our argument's name": (front("self: 1"), {}, "without its front matter"),
    "a date": (front("license: 2024-01-01", "language: en"), {"language": "en"}, "its license:"),
    "a mapping": (front("license: {a: b}", "language: en"), {"language": "en"}, "its license:"),
    "a license of many": (front("license: [mit, gpl]"), {}, "its license:"),
    "numbers": (front("language: 3", "tags: 5"), {}, "its language, tags:"),
    "mixed lists": (front("language: [en, 3]", "license: mit"), {"license": "mit"}, "language:"),
    "Norwegian": (front("language: no", "license: mit"), {"license": "mit"}, "language:"),
    "a key that is no text": (front("1: 2", "license: mit"), {"license": "mit"}, "its 1:"),
    "nulls": (front("language:", "license: mit"), {"license": "mit"}, None),
    "an unknown license": (front("license: valley-9"), {"license": "valley-9"}, None),
    "broken results": (front("license: mit", "model-index: 5"), {"license": "mit"}, None),
    "broken results in a list": (
        front("license: mit", "model-index: [{name: a, results: [{}]}]"), {"license": "mit"}, None,
    ),
    "binary": (bytes(range(256)), {}, "README.md is left out: "),
    "UTF-16": ("---\nlicense: mit\n---\n".encode("utf-16"), {}, "README.md is left out: "),
    "huge": (front("license: mit") + b"x" * CARD_BYTES, {}, "it has more than 1,048,576 bytes"),
    "empty": (b"", {}, None),
}  # fmt: skip


def teacher_with(base, where, content):
    for file in base.iterdir():
        if file.name != CARD:
            (where / file.name).write_bytes(file.read_bytes())
    if content is None:
        (where / CARD).mkdir()
    else:
        (where / CARD).write_bytes(content)
    return where


@pytest.mark.parametrize("name", [*STRANGE_CARDS, "a folder"])
def test_no_card_stops_a_model(base, tmp_path, capsys, name):
    """A bad card stops neither conversion nor saving nor uptraining."""
    content, kept, line = STRANGE_CARDS.get(
        name, (None, {}, "README.md is left out: it is not a file")
    )
    (tmp_path / "base").mkdir()
    teacher = teacher_with(base, tmp_path / "base", content)
    written = teacher_metadata(teacher)
    assert written == kept
    printed = capsys.readouterr().out
    assert printed.count("\n") == (line is not None) and (line or "") in printed
    carry_card(str(teacher), tmp_path / "saved")
    update_card(tmp_path / "saved", tokens=7, results={"teacher": {"perplexity": 9.0}})
    saved = read_card(tmp_path / "saved" / CARD)
    if "left out" in printed:
        assert saved is None
    else:
        assert "Trained on 7 tokens" in saved.text and kept.items() <= saved.data.to_dict().items()


def test_a_model_is_made_whatever_its_card(base, tmp_path):
    (tmp_path / "base").mkdir()
    teacher = teacher_with(base, tmp_path / "base", front("license: [a"))
    convert(teacher, tmp_path / "rnn", mixer="supra")
    assert "# base as a recurrent network" in (tmp_path / "rnn" / CARD).read_text()
    (tmp_path / "rnn" / CARD).write_bytes(b"\xff\xfe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").is_file()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * 10**6, b""])
def test_a_licence_without_words(base, tmp_path, content):
    teacher = teacher_with(base, tmp_path, b"# No front matter\n")
    (teacher / "LICENSE").write_bytes(content)
    assert teacher_metadata(teacher)["license"] == "other"


def test_a_card_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    (tmp_path / CARD).write_text("---\nlicense: mit\n---\n")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert teacher_metadata(tmp_path) == {}
    assert "README.md is left out: [Errno 13] Permission denied" in capsys.readouterr().out
