"""The largest sizes that settings and options take, so that a typo does not end in hours without an
answer or out of memory.

They are above what any machine can do, so they stop no real use.
"""

from collections.abc import Mapping
from typing import Any

from supra.errors import UserError, shown

TEXT = 10**15  # tokens of a text or of a run; the largest models were trained on less than 10**14
STREAM = 2**30  # tokens read one after the other; days on the fastest machine
PASS = 2**22  # tokens of one forward pass: hidden states of 1024 channels then take 16 GB
STEP = 2**26  # tokens of a step in one process; the largest runs have as many in all processes
COUNT = 10**6  # rows, measurements, new tokens
WIDTH = 2**16  # channels, ranks, heads
VOCABULARY = 2**24  # the largest public ones have 2**18 tokens
BEAMS = 2**10  # and processes
SEED = 2**32 - 1  # numpy's

OPTIONS = {
    "tokens": TEXT, "context": TEXT, "to": STREAM, "fix_to": STREAM, "every": STREAM,
    "sequence_length": PASS, "trained_length": PASS, "chunk": PASS, "lengths": PASS,
    "recall_lengths": PASS,
    "batch": COUNT, "samples": COUNT, "max_new_tokens": COUNT, "repeats": COUNT,
    "keys": COUNT, "pairs": WIDTH, "depths": WIDTH, "heads": WIDTH, "head_size": WIDTH,
    "head_sizes": WIDTH, "widths": WIDTH,
    "vocabulary": VOCABULARY, "beams": BEAMS, "jobs": BEAMS, "seed": SEED,
}  # fmt: skip
"""The limit of each command line option by name; for a list of numbers, of each number."""


def check_options(given: Mapping[str, Any]) -> None:
    """Raise UserError for an option of a command that is larger than it may be."""
    for name, value in given.items():
        if name in OPTIONS and isinstance(value, int):
            check_option(name, value)


def check_option(name: str, value: int) -> None:
    if value > OPTIONS[name]:
        option = name.replace("_", "-")
        raise UserError(f"--{option} (={shown(value)}) must be at most {OPTIONS[name]}")
