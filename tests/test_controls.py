"""Negative controls: with a bug put in, the tests that should see it do."""

import os
import re
import subprocess
import sys

import pytest

from tests.bugs import BUGS

MODELING, STATES = "tests/model/test_modeling.py", "tests/model/test_states.py"
FAMILIES = "tests/model/test_families.py"
# bug -> the file, the models, and the tests of which each must fail with one of them
CAUGHT = {
    "padding_mask_dropped": (
        MODELING, "pure and llama", "test_a_left_padded_batch_is_its_rows_alone",
        "test_padded_generation_is_generation_alone",
    ),
    "beams_not_reordered": (MODELING, "pure and llama", "test_cached_generation_is_uncached"),
    "past_forgotten_at_decode": (MODELING, "pure and llama", "test_decoding_is_prefill"),
    "roll_back_does_nothing": (
        STATES, "pure", "test_crop_forgets_the_last_tokens",
        "test_assisted_decoding_is_greedy_decoding",
    ),
    "rotary_twice": (FAMILIES, "llama", "test_softmax_is_the_original"),
    "documents_run_together": (
        MODELING, "pure and llama", "test_packed_rows_are_separate_documents",
    ),
    "state_in_half_precision": (MODELING, "pure and llama", "test_decoding_is_prefill"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug):
    file, models, *tests = CAUGHT[bug]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "tests.bugs", "--tb=no"]
    command += [file, "-k", f"{models} and ({' or '.join(tests)})"]
    environment = os.environ | {"SUPRA_BUG": bug}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 1, run.stdout + run.stderr  # tests failed; 2 and up: none ran
    failed = re.findall(r"^FAILED \S+::(\w+)", run.stdout, re.MULTILINE)
    assert set(failed) == set(tests)
