"""Random text: the speed of training does not depend on what it says."""

import json
import random
from pathlib import Path

WORDS = 400  # of a document
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_text(file: Path, tokens: int) -> Path:
    """A file of random documents of at least so many tokens, unless it is there already."""
    if not file.exists():
        draw = random.Random(0)
        lines = [_document(draw) for _ in range(2 + tokens // WORDS)]
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def _document(draw: random.Random) -> str:
    return " ".join("".join(draw.choices(LETTERS, k=draw.randint(2, 9))) for _ in range(WORDS))
