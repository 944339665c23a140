"""Arguments of generation: every mistake names the option, its value and the rule."""

import math

import pytest

from supra.checkpoint.opening import Checkpoint
from supra.errors import UserError
from supra.serving.generation import stream_text


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("top_p", 0.5, r"--top-p \(=0.5\) changes nothing at --temperature 0"),
        ("beams", 0, r"--beams \(=0\) must be >= 1"),
        ("max_new_tokens", 0, r"--max-new-tokens \(=0\) must be >= 1"),
        ("top_p", 0.0, r"--top-p \(=0.0\) must be > 0 and <= 1"),
        ("top_p", 1.5, r"--top-p \(=1.5\) must be > 0 and <= 1"),
        ("top_p", math.nan, r"--top-p \(=nan\) must be > 0 and <= 1"),
        ("temperature", -1.0, r"--temperature \(=-1.0\) must be finite and >= 0"),
        ("temperature", math.nan, r"--temperature \(=nan\) must be finite and >= 0"),
        ("temperature", math.inf, r"--temperature \(=inf\) must be finite and >= 0"),
        ("seed", -1, r"--seed \(=-1\) must be >= 0 and < 4294967296"),
        ("seed", 2**32, r"--seed \(=4294967296\) must be >= 0 and < 4294967296"),
    ],
)
def test_mistakes_are_named(tmp_path, argument, value, message):
    with pytest.raises(UserError, match=message):
        stream_text(Checkpoint("model", tmp_path), "prompt", **{argument: value})
