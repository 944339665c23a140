"""Texts to train on."""

import json


def write_texts(file, count):
    """Write `count` documents of different lengths as JSON lines."""
    with open(file, "w") as lines:
        for number in range(count):
            text = f"The river rises {number} times. " * (9 - number % 7)
            print(json.dumps({"text": text}), file=lines)
