"""Evaluation sets: folders without the files, and records without the fields."""

import gzip
import json

from tests.faults.case import BINARY, DEEP, Case, Make, put, refused, written

SUITE = "eval suite --model {rnn} --data {here} --tasks "
TEXTS, SHOTS = "wikitext", "in_context --shots 0,2 --limit 2"
ARTICLE = json.dumps({"text": "the river runs to the sea. " * 9}) + "\n"
EXAMPLE = {"task": "plural", "input": "river", "output": "rivers"}
EXAMPLES = "".join(json.dumps(EXAMPLE | {"input": f"river {n}"}) + "\n" for n in range(9))


def _changed(**changes: object) -> str:
    """Nine examples, and one with other values; a value of None leaves the field out."""
    example = {name: x for name, x in (EXAMPLE | changes).items() if x is not None}
    return EXAMPLES + json.dumps(example) + "\n"


def _files(**contents: str | bytes) -> Make:
    def make(here, common):
        for name, content in contents.items():
            put(here / name.replace("_", "."), content)

    return make


# what is wrong, the task, how the folder is made, what the line names
REFUSED: list[tuple[str, str, Make | None, str]] = [
    ("an empty folder", TEXTS, None, "has no file for wikitext"),
    ("a folder of other files", TEXTS, written("wikitext.txt", "a"), "has no file for wikitext"),
    ("a set of another name", SHOTS, written("shots.jsonl", EXAMPLES), "no file for in_context"),
    ("two files of a set", TEXTS, _files(wikitext1_jsonl=ARTICLE, wikitext2_jsonl=ARTICLE),
     "wikitext1.jsonl, wikitext2.jsonl"),
    ("an empty set", SHOTS, written("icl.jsonl", "\n"), "holds no records"),
    ("a set that is binary", SHOTS, written("icl.jsonl", BINARY), "line 1"),
    ("a set that is deep", SHOTS, written("icl.jsonl", DEEP), "line 1"),
    ("a set of lists", TEXTS, written("wikitext.jsonl", "[1]\n"), "is not a JSON object"),
    ("plain text named gz", TEXTS, written("wikitext.jsonl.gz", ARTICLE), "cannot be read"),
    ("a cut gz", TEXTS, written("wikitext.jsonl.gz", gzip.compress(ARTICLE.encode())[:-9]),
     "cannot be read"),
    ("an example without its output", SHOTS, written("icl.jsonl", _changed(output=None)),
     "line 10: there is no field 'output'"),
    ("an example with a number", SHOTS, written("icl.jsonl", _changed(input=7)), "must be text"),
    ("an example with a blank answer", SHOTS, written("icl.jsonl", _changed(output=" ")),
     "field 'output'"),
    ("half a character", SHOTS, written("icl.jsonl", EXAMPLES + json.dumps(
        EXAMPLE | {"output": "\ud800"}) + "\n"), "line 10"),
    ("an article in another field", TEXTS, written("wikitext.jsonl", '{"body": "a"}\n'),
     "no field 'text'"),
    ("too few articles", TEXTS, written("wikitext.jsonl", ARTICLE), "sequence_length"),
    ("no numbers of shots", "in_context --shots ''", written("icl.jsonl", EXAMPLES), "--shots"),
    ("too few examples", "in_context --shots 48", written("icl.jsonl", EXAMPLES),
     "lower --shots"),
]  # fmt: skip

CASES: list[Case] = [
    refused(SUITE + task, says, make=make, name=f"suite: {name}")
    for name, task, make, says in REFUSED
]
