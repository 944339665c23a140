"""Every command that runs a model prints the same, whether its weights are in memory or not."""

import contextlib
import re
import shlex

import pytest

from supra.cli import main
from supra.conversion.convert import convert
from supra.testing import tiny_checkpoint
from tests.evaluate.suite_sets import write_sets
from tests.native_models import native_checkpoint

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
TEXT = "--text {home}/text.txt --sequence-length 48 --tokens 96 --json"
COMMANDS = [
    'generate {home}/rnn --prompt "The river" --max-new-tokens 3 --temperature 1',
    "eval text {home}/rnn " + TEXT,
    "eval text {home}/native " + TEXT,
    "eval ablate {home}/rnn --teacher {home}/base --parts floors,layers,lookback " + TEXT,
    "eval task {home}/rnn --task mqar --lengths 24 --pairs 2 --samples 3 --json",
    "eval passkey {home}/rnn --lengths 600 --depths 2 --samples 1 --json",
    "eval suite {home}/rnn --data {home}/sets --tasks in_context --limit 2 --shots 0,1 --json",
    "diagnose {home}/rnn --text {home}/text.txt --to 64 --trained-length 16 --json",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny_checkpoint(home / "base")
    convert(home / "base", home / "rnn", mixer="mamba2", keep_attention=[1])
    native_checkpoint(home / "native", "bamba")
    (home / "text.txt").write_text("The river rises in the hills and runs south.\n\n" * 60)
    write_sets(home / "sets")
    return home


def printed(capsys, words):
    with contextlib.suppress(SystemExit):
        main(words)
    printed = capsys.readouterr()
    assert "error" not in printed.err
    return printed.out


def parts(text):
    """A text without its numbers, and these: one token at a time may round otherwise."""
    return NUMBER.sub("", text), [float(x) for x in NUMBER.findall(text)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda x: " ".join(x.split()[:3]))
def test_results_are_the_same(command, home, capsys):
    words = shlex.split(command.format(home=home))
    plain = printed(capsys, words)
    placed = printed(capsys, [*words, "--device-map", "auto", "--max-memory", "cpu=100KB"])
    (words, numbers), (expected_words, expected) = parts(placed), parts(plain)
    assert words == expected_words != ""
    assert numbers == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_what_a_model_writes_is_the_same(home, tmp_path, capsys):
    words = ["sample", str(home / "rnn"), *shlex.split("--tokens 30 --length 12 --out")]
    printed(capsys, [*words, str(tmp_path / "plain.jsonl")])
    placed = ["--device-map", "auto", "--max-memory", "cpu=100KB"]
    printed(capsys, [*words, str(tmp_path / "placed.jsonl"), *placed])
    plain = (tmp_path / "plain.jsonl").read_text()
    assert (tmp_path / "placed.jsonl").read_text() == plain != ""
