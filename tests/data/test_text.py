"""Broken text gives an error of one line with file and line, streamed or not. Without streaming it
comes before training."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from supra import testing
from supra.cli import main
from supra.conversion.convert import convert
from supra.data.text import open_dataset, open_documents
from supra.errors import UserError
from supra.uptrain import loop

GOOD = b'{"text": "The river rises in the hills and runs south."}\n'


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# lines of a .jsonl -> the error; each is tried as the fourth line of seven, and as the first
LINES = {
    "not UTF-8": (b'{"text": "bad \xff byte"}\n', "'utf-8' codec can't decode byte 0xff"),
    "Latin-1": ('{"text": "né à"}\n'.encode("latin1"), "'utf-8' codec can't decode byte 0xe9"),
    "no UTF-8 in a name": (b'{"te\xffxt": "words"}\n', "'utf-8' codec can't decode byte 0xff"),
    "cut": (b'{"text": "wor\n', "JSON parse error: "),
    "more after it": (b'{"text": "a"} more\n', "JSON parse error: Extra data"),
    "zeros": (b"\0\0\0\n", "JSON parse error: Expecting value"),
    "a string": (b'"words"\n', "'\"words\"' is not a JSON object"),
    "a number": (b"5\n", "'5' is not a JSON object"),
    "null": (b"null\n", "'null' is not a JSON object"),
    "half a character": (b'{"text": "a\\ud800b"}\n', "surrogates not allowed"),
    "text that is a list": (b'{"text": ["a"]}\n', "text field 'text' holds list, not text"),
    "text that is a number": (b'{"text": 5}\n', "text field 'text' holds int, not text"),
}


def read(path, streaming):
    """All texts of a file, opened as `uptrain` does."""
    from supra.data.text import Documents

    dataset = open_dataset(str(path), streaming=streaming)
    return list(Documents(dataset, "text", source=str(path)).epoch(0))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("place", [4, 1])
@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named(tmp_path, name, place, suffix):
    line, reason = LINES[name]
    content, path = GOOD * (place - 1) + line + GOOD * 3, tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    for streaming in (False, True):
        if streaming and name == "null" and place > 1:
            continue  # Arrow says nothing, and takes it for a blank document
        with pytest.raises(UserError) as error:
            read(path, streaming)
        said = str(error.value)
        assert "\n" not in said and f"{path}, line {place}" in said and reason in said, streaming


OTHERS = {
    "not UTF-8.txt": (b"one\ntwo \xff\n", ", line 2: 'utf-8' codec can't decode byte 0xff"),
    "empty.jsonl": (b"", ": it is empty"),
    "blank.jsonl.gz": (gzip.compress(b""), ": it is empty"),
    "cut.jsonl.gz": (
        gzip.compress(GOOD * 9, mtime=0)[:-9],
        "Compressed file ended before the end-of-stream marker",
    ),
    "damaged.jsonl.gz": (gzip.compress(b"")[:10] + b"\xff" * 9, ": Error -3 while decompressing"),
    "list.jsonl": (b'[{"text": "a"},\n {"text": }]\n', ", line 2, column "),
    "nonsense.parquet": (b"PAR1 nothing else", ": "),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_bad_file_is_named(tmp_path, name):
    content, reason = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    for streaming in (False, True):
        with pytest.raises(UserError) as error:
            read(tmp_path / name, streaming)
        said = str(error.value)
        assert "\n" not in said and f"{tmp_path / name}" in said and reason in said, streaming


def test_streamed_blocks_that_begin_with_null(tmp_path):
    """Blocks are 10 MB, rounded up to whole lines. Arrow crashes on a block that begins with
    null."""
    line = json.dumps({"text": "the river " * 1000}) + "\n"
    block = line * (10 * 2**20 // len(line) + 1)
    (tmp_path / "t.jsonl").write_text(block + "null\n" + line)
    with pytest.raises(UserError, match=r"t.jsonl, line 1049: 'null' is not a JSON object"):
        read(tmp_path / "t.jsonl", streaming=True)


def test_parquet_that_is_not_utf8(tmp_path):
    buffer = pyarrow.array([b"fine", b"bad \xff"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(2, *buffer.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: .*UTF8"):
        open_dataset(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"a\.parquet: .*UTF8"):
        read(tmp_path / "a.parquet", streaming=True)


def test_which_of_several_files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(GOOD * 3)
    (tmp_path / "b.jsonl").write_bytes(GOOD + LINES["not UTF-8"][0] + GOOD)
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot be read: {tmp_path}/b.jsonl, line 2"):
        open_documents(str(tmp_path), "text")


def test_what_is_no_fault(tmp_path):
    """A list of rows, blank lines, a byte-order mark, rows without text."""
    rows = {
        "list": (b'[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        "blank": (GOOD + b"\n \n" + GOOD, [json.loads(GOOD)["text"]] * 2),
        "mark": (b"\xef\xbb\xbf" + GOOD, [json.loads(GOOD)["text"]]),
        "without": (GOOD + b'{"text": null}\n{"body": "a"}\n', [json.loads(GOOD)["text"], "", ""]),
    }
    for name, (content, texts) in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(content)
        for streaming in (False, True):
            assert read(path, streaming) == texts, name


# every command that takes text


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    testing.tiny_checkpoint(folder / "teacher")
    convert(str(folder / "teacher"), folder / "student", mixer="mamba2")
    (folder / "config.yaml").write_text(
        "data: {sequence_length: 16}\nbatch: {size: 2}\nprecision: fp32\ntune: {tokens: 3200}\n"
    )
    return folder


COMMANDS = {
    "eval": "eval text --model {student} --text {text}",
    "ablate": "eval ablate --model {student} --text {text}",
    "diagnose": "diagnose {student} --text {text} --to 128 --trained-length 16",
    "fix": "diagnose {student} --text {good} --to 128 --trained-length 16 --fix auto "
    "--fix-text {text}",
    "convert": "convert --model {teacher} --out {out} --keep-attention auto:0.5 --text {text}",
    "uptrain": "uptrain --config {config} student={student} out={out} data.path={text}",
    "streaming": "uptrain --config {config} student={student} out={out} data.path={text} "
    "data.streaming=true data.shuffle_seed=null",
    "held out": "uptrain --config {config} student={student} out={out} data.path={good} "
    "data.eval_path={text} data.streaming=true",
}


def run(models, tmp_path, command):
    places = {x: models / x for x in ("teacher", "student")} | {"config": models / "config.yaml"}
    places |= {"text": tmp_path / "text.jsonl", "good": tmp_path / "good.jsonl"}
    main([word.format(**places, out=tmp_path / "out") for word in command.split()])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command(models, tmp_path, monkeypatch, capsys, name):
    bad = 60 if name in ("held out", "streaming") else 3
    lines = GOOD * (bad - 1) + LINES["not UTF-8"][0] + GOOD * 300
    (tmp_path / "text.jsonl").write_bytes(lines)
    (tmp_path / "good.jsonl").write_bytes(GOOD * 300)
    if name == "uptrain":
        monkeypatch.setattr(loop.Run, "train", lambda *_: pytest.fail("the run has begun"))
    with pytest.raises(SystemExit) as exit:
        run(models, tmp_path, COMMANDS[name])
    assert exit.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"text.jsonl, line {bad}: 'utf-8' codec can't decode byte 0xff" in last


def test_a_text_field_without_text_is_refused(models, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run(models, tmp_path, "convert --model {teacher} --out {out} --text-field body")
    assert exit.value.code == 2
    assert "--text-field (=body) needs --text: give both" in capsys.readouterr().err
