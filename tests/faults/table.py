"""The table of bad inputs: every chapter of it, in one list."""

from tests.faults import configs, evaluation_sets, files, options, runs, settings, texts

CASES = [
    case
    for chapter in (options, configs, files, texts, evaluation_sets, settings, runs)
    for case in chapter.CASES
]
