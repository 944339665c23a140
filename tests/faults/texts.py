"""Texts: files that are empty, cut, of another kind, or not UTF-8; in evaluation and training."""

import gzip
import json
from itertools import cycle
from pathlib import Path

from tests.faults.case import (
    BINARY,
    DEEP,
    Case,
    Make,
    accepted,
    copied,
    fields,
    put,
    refused,
    written,
)
from tests.faults.shared import TEXT

EVAL = "eval text --model {rnn} --sequence-length 16 --text {here}/"
UPTRAIN = "uptrain --config {yaml} out={out} data.path={here}/"
STREAMED = UPTRAIN.replace("data.path", "data.streaming=true data.path")
HELD_OUT = UPTRAIN.replace("data.path", "data.eval_path")
DIAGNOSE = "diagnose {rnn} --to 64 --trained-length 16 --text {here}/"
CHOICE = "convert --model {base} --out {out} --keep-attention auto:0.5 --text {here}/"
ALL = (EVAL, UPTRAIN, STREAMED, HELD_OUT, DIAGNOSE, CHOICE)

LINE = json.dumps({"text": TEXT * 4}) + "\n"
CHAT = (
    json.dumps(
        {
            "messages": [
                {"role": "user", "content": TEXT},
                {"role": "assistant", "content": TEXT * 4},
            ]
        }
    )
    + "\n"
)
LATIN = LINE.encode().replace(b"river", b"caf\xe9s", 1)
LONG = json.dumps({"text": TEXT * 400}) + "\n"
GOOD = LINE.encode() * 30


def _parquet(rows: list[dict]) -> Make:
    def make(here: Path, common: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), here / "t.parquet")

    return make


def _chats(template: str) -> Make:
    """{here}/t.jsonl, and {model} with a chat template."""
    copy = copied("rnn", fields({"chat_template": template}, "tokenizer_config.json"))

    def make(here: Path, common: Path) -> None:
        copy(here, common)
        put(here / "t.jsonl", CHAT * 30)

    return make


def _shared(name: str, to: str, change) -> Make:
    return lambda here, common: put(here / to, change((common / name).read_bytes()))


# what is wrong, the file's name, how it is made, what the line names
REFUSED: list[tuple[str, str, Make | None, str]] = [
    ("no file", "none.txt", None, "none.txt"),
    ("no file of a pattern", "*.txt", None, "*.txt"),
    ("an empty folder", "texts", lambda here, _: (here / "texts").mkdir(), "texts"),
    ("a folder of other files", "texts", written("texts/a.csv", "a,b"), "texts"),
    ("a folder of two kinds", "texts",
     lambda here, _: [put(here / "texts" / name, LINE) for name in ("a.txt", "b.jsonl")], "texts"),
    ("a folder that is called a text", "t.txt", lambda here, _: (here / "t.txt").mkdir(), "t.txt"),
    ("another kind of file", "t.csv", written("t.csv", "text\na\n"), "t.csv"),
    ("a name without an ending", "t", written("t", TEXT), "t"),
    ("an empty file", "t.txt", written("t.txt", ""), "text"),
    ("a blank file", "t.txt", written("t.txt", " \n\n\t"), "0 tokens"),
    ("a text that is too short", "t.txt", written("t.txt", "a b"), "tokens"),
    ("a text of zeros", "t.txt", written("t.txt", b"\0\xff" * 50), "UTF-8"),
    ("Latin-1", "t.txt", written("t.txt", TEXT.encode() * 50 + b"caf\xe9\n"), "UTF-8"),
    ("UTF-16", "t.txt", written("t.txt", (TEXT * 50).encode("utf-16")), "UTF-8"),
    ("a binary text", "t.txt", written("t.txt", BINARY * 10), "UTF-8"),
    ("an empty jsonl", "t.jsonl", written("t.jsonl", ""), "t.jsonl"),
    ("a jsonl of empty lines", "t.jsonl", written("t.jsonl", "\n\n\n"), ("t.jsonl", "no text")),
    ("a jsonl of Latin-1 at its start", "t.jsonl", written("t.jsonl", LATIN + GOOD), "UTF-8"),
    ("a jsonl of Latin-1 at its end", "t.jsonl", written("t.jsonl", GOOD + LATIN), "UTF-8"),
    ("a jsonl whose last line is cut", "t.jsonl", written("t.jsonl", GOOD[:-20]), "t.jsonl"),
    ("a jsonl with a line that is no JSON", "t.jsonl",
     written("t.jsonl", GOOD + b"{text: a}\n" + GOOD), "t.jsonl"),
    ("a jsonl of texts alone", "t.jsonl", written("t.jsonl", '"text"\n' * 9), "t.jsonl"),
    ("a jsonl of numbers", "t.jsonl", written("t.jsonl", "7\n" * 9), "t.jsonl"),
    ("a jsonl of lists", "t.jsonl", written("t.jsonl", "[1, 2]\n" * 9), "t.jsonl"),
    ("a jsonl of nulls", "t.jsonl", written("t.jsonl", "null\n" * 9), "t.jsonl"),
    ("a jsonl that is deep", "t.jsonl", written("t.jsonl", '{"text": ' + DEEP + "\n"), "t.jsonl"),
    ("a jsonl that is binary", "t.jsonl", written("t.jsonl", BINARY), "t.jsonl"),
    ("a jsonl that is one array", "t.jsonl", written("t.jsonl", json.dumps([{"a": 1}])), "text"),
    ("another field", "t.jsonl", written("t.jsonl", '{"body": "words"}\n' * 9), "body"),
    ("a number in the field", "t.jsonl", written("t.jsonl", '{"text": 7}\n' * 9), "text"),
    ("a list in the field", "t.jsonl", written("t.jsonl", '{"text": ["a"]}\n' * 9), "text"),
    ("a mapping in the field", "t.jsonl", written("t.jsonl", '{"text": {"a": 1}}\n' * 9), "text"),
    ("true in the field", "t.jsonl", written("t.jsonl", '{"text": true}\n' * 9), "text"),
    ("a number in one field of many", "t.jsonl",
     written("t.jsonl", GOOD + b'{"text": 7}\n' + GOOD), "t.jsonl"),
    ("null in every field", "t.jsonl", written("t.jsonl", '{"text": null}\n' * 9), "tokens"),
    ("a cut gz", "t.jsonl.gz", _shared("text.jsonl.gz", "t.jsonl.gz", lambda x: x[:-60]),
     "t.jsonl.gz"),
    ("an empty gz", "t.jsonl.gz", written("t.jsonl.gz", ""), "t.jsonl.gz"),
    ("plain text named gz", "t.jsonl.gz", written("t.jsonl.gz", LINE), "t.jsonl.gz"),
    ("a gz with flipped bytes", "t.jsonl.gz", _shared(
        "text.jsonl.gz", "t.jsonl.gz", lambda x: x[:40] + b"\0\0\0\0" + x[44:]), "t.jsonl.gz"),
    ("a gz of binary", "t.jsonl.gz", written("t.jsonl.gz", gzip.compress(BINARY)), "t.jsonl.gz"),
    ("a cut parquet", "t.parquet", _shared("text.parquet", "t.parquet", lambda x: x[:-60]),
     "t.parquet"),
    ("an empty parquet", "t.parquet", written("t.parquet", ""), "t.parquet"),
    ("plain text named parquet", "t.parquet", written("t.parquet", LINE), "t.parquet"),
    ("a parquet with flipped bytes", "t.parquet", _shared(
        "text.parquet", "t.parquet", lambda x: x[:30] + b"\xff" * 40 + x[70:]), "t.parquet"),
    ("a parquet without the field", "t.parquet", _parquet([{"body": "a"}] * 3), "body"),
    ("a parquet of numbers", "t.parquet", _parquet([{"text": 7}] * 9), "text"),
    ("a parquet without rows", "t.parquet", lambda here, _: _empty_parquet(here / "t.parquet"),
     "t"),
    ("a link to itself", "t.txt", lambda here, _: (here / "t.txt").symlink_to("t.txt"), "t.txt"),
]  # fmt: skip


def _empty_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("text", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), path)


def _cases() -> list[Case]:
    """Each in an evaluation, and in one of the other commands, in turn."""
    found, others = [], cycle(ALL[1:])
    for name, file, make, says in REFUSED:
        for command in (EVAL, next(others)):
            kind = {STREAMED: "streamed", HELD_OUT: "held out"}.get(command, command.split()[0])
            found.append(refused(command + file, says, make=make, name=f"{kind}: {name}"))
    return found


CASES = [
    *_cases(),
    refused(STREAMED + "t.jsonl", "'null' is not a JSON object",
            make=written("t.jsonl", LONG * (10 * 2**20 // len(LONG) + 1) + "null\n" + LONG),
            name="a block of streamed lines that begins with null"),
    refused("eval text --model {rnn} --text nobody/no-texts", "nobody/no-texts"),
    refused("uptrain --config {yaml} out={out} data.path=nobody/no-texts", "nobody/no-texts"),
    refused("uptrain --config {yaml} out={out} data.path=''", "data.path"),
    refused("uptrain --config {yaml} out={out} data.split=test", "split"),
    refused("uptrain --config {yaml} out={out} data.name=first", "name"),
    refused("uptrain --config {yaml} out={out} data.text_field=body", "body"),
    refused("uptrain --config {yaml} out={out} data.min_document_tokens=100000",
            "min_document_tokens"),
    refused("uptrain --config {yaml} out={out} data.eval_documents=1000000", "eval_documents"),
    refused("uptrain --config {yaml} out={out} data.sequence_length=100000000", "sequence_length"),
    refused("uptrain --config {yaml} out={out} data.eval_split=test", "split (='test')"),
    refused(UPTRAIN + "t.jsonl", "no chat template", make=written("t.jsonl", CHAT * 9),
            name="chats for a tokenizer without a template"),
    refused(UPTRAIN + "t.jsonl student={model}", "TemplateSyntaxError", make=_chats("{% for"),
            name="chats for a template that is broken"),
    refused(UPTRAIN + "t.jsonl student={model}", "does not show which tokens",
            make=_chats("{{ messages | length }}"),
            name="chats for a template that hides the answers"),
    refused(EVAL + "t.jsonl", "text", make=written("t.jsonl", CHAT * 9),
            name="chats where text is evaluated"),
    refused(UPTRAIN + "t.jsonl", "neither text nor messages",
            make=written("t.jsonl", '{"messages": [{"content": "a"}]}\n' * 9),
            name="messages without roles"),
    accepted(UPTRAIN + "t.jsonl student={model}", "a chat is a document",
             make=_chats("{% for x in messages %}{{ x.role + ': ' + x.content }}{% endfor %}"),
             name="chats"),
    accepted(EVAL + "t.txt", "text after a mark of order is text",
             make=written("t.txt", b"\xef\xbb\xbf" + TEXT.encode() * 9), name="a mark of order"),
    accepted(EVAL + "t.jsonl", "a record without text is no document",
             make=written("t.jsonl", GOOD + b'{"text": null}\n' + GOOD), name="one field of null"),
    accepted(EVAL + "t.jsonl", "a record without text is no document",
             make=written("t.jsonl", GOOD + b'{"text": ""}\n' + GOOD), name="one empty text"),
    accepted(EVAL + "t.jsonl", "an empty line is no record",
             make=written("t.jsonl", GOOD + b"\n" + GOOD), name="one empty line"),
    refused(EVAL + "t.jsonl", "surrogate",
            make=written("t.jsonl", GOOD + b'{"text": "\\ud800 river"}\n'), name="a surrogate"),
    accepted(EVAL + "t.jsonl", "other fields may be of any kind",
             make=written("t.jsonl", b'{"n": 1, "text": "' + TEXT.encode() * 9 + b'"}\n'),
             name="other fields"),
    accepted(EVAL + "t.txt", "one line may be of any length",
             make=written("t.txt", TEXT * 400), name="a line of 20 KB"),
]  # fmt: skip
