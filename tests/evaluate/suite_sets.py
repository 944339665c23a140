"""Small evaluation sets with made-up words, for the tests of `supra eval suite`."""

import gzip
import json
from pathlib import Path
from random import Random

WORDS = [
    *("river", "hills", "valley", "sea", "bridge", "stones", "page"),
    *("model", "token", "state", "south", "north", "day", "old"),
]


def write_sets(folder: Path, seed: int = 0) -> Path:
    """All five sets; one of them is compressed."""
    draw = Random(seed)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    folder.mkdir()
    _write(folder / "lambada_small.jsonl", [{"text": words(n % 5 + 6)} for n in range(13)])
    goals = [
        {"goal": words(4), "sol1": f"Take the {words(5)}", "sol2": f"Take the {words(n % 4 + 2)}"}
        for n in range(15)
    ]
    _write(folder / "piqa_small.jsonl.gz", [goal | {"label": draw.randrange(2)} for goal in goals])
    sentences = [
        {"sentence_good": f"The {words(n % 4 + 2)}", "sentence_bad": f"The {words(3)}"}
        for n in range(14)
    ]
    _write(folder / "blimp.jsonl", sentences)
    _write(folder / "wikitext.jsonl", [{"text": words(60)} for _ in range(10)])
    examples = [
        {"task": task, "input": f"{words(1)} {n}", "output": "sea" if task == "same" else words(1)}
        for task in ("same", "any")
        for n in range(20)
    ]
    _write(folder / "icl.jsonl", examples)
    return folder


def _write(file: Path, rows: list[dict]) -> None:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "wt", encoding="utf-8") as lines:
        for row in rows:
            print(json.dumps(row), file=lines)
