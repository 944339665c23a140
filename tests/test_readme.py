"""Every example of the README runs, on a tiny model and a tiny text."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from supra.testing import tiny_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# first line -> why the block is not run
NOT_RUN = {
    "make demo    # a real model becomes a recurrent network": "minutes each; one runs this test",
    "python3 -m venv .venv && . .venv/bin/activate": "installs what the tests run in",
    "supra/": "the map of folders, see test_the_map_names_every_folder",
}
# (as the README has it, as it is small enough)
SUBSTITUTIONS = [
    ("HuggingFaceTB/SmolLM2-135M", "./teacher"),
    (
        "out=out/first",
        "out=out/first precision=fp32 budget.tokens=256 batch.size=2 data.sequence_length=32 "
        "data.eval_documents=2 eval.tokens=64 calibrate.tokens=64",
    ),
    ("./rnn --text corpus.jsonl", "./rnn --text corpus.jsonl --sequence-length 64"),
    ("--to 65536", "--to 256 --trained-length 32"),
]


def blocks():
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def first_line(block):
    return block.splitlines()[0]


def test_every_example_runs(tmp_path):
    tiny_checkpoint(tmp_path / "teacher")
    with open(tmp_path / "corpus.jsonl", "w") as file:
        for number in range(12):
            print(json.dumps({"text": f"The river rises {number} times. " * 8}), file=file)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "cache"),
        "ACCELERATE_USE_CPU": "true",
    }
    used, output, python = set(), "", ""
    for language, block in blocks():
        if first_line(block) in NOT_RUN:
            continue
        for written, small in SUBSTITUTIONS:
            if written in block:
                used.add(written)
            block = block.replace(written, small)
        if language == "python":
            python += block  # a block goes on where the last one stopped
        command = [sys.executable, "-c", python] if language == "python" else ["sh", "-ec", block]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{block}\n{result.stderr}"
        output += result.stdout
    assert used == {written for written, _ in SUBSTITUTIONS}
    for printed in ("copied", "The state is", "perplexity", "layers 0-1 mamba2"):
        assert printed in output
    card = (tmp_path / "out" / "first" / "final" / "README.md").read_text()
    assert "Trained on 256 tokens" in card and "| uptrained |" in card


def test_no_reason_outlives_its_block():
    assert set(NOT_RUN) <= {first_line(block) for _, block in blocks()}


def test_the_map_names_every_folder():
    """And no other."""
    (text,) = (block for _, block in blocks() if first_line(block) == "supra/")
    named, path = set(), []
    for line in text.splitlines():
        name = line.split()[0]
        path = [*path[: (len(line) - len(line.lstrip())) // 2], name]
        named.add("".join(path))
    rooms = {p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("supra/**/__init__.py")}
    assert named == {f"{room}/" for room in {*rooms, "kernels", "recipes", "tests"}}


def test_what_differs_from_a_paper_stands_in_one_place():
    """Every recipe and every mixer with a paper's name has a row there, and recipes point to it."""
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    title = "What differs from what was published"
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    for name in ("supra_paper", "t2r", "hedgehog", "lolcats", "radlads", "mohawk"):
        recipe = (ROOT / "recipes" / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        assert f'recipes/README.md, "{title}"' in recipe, name
        assert f"| `{name}.yaml` |" in section, name
    mixers = ("supra_paper", "t2r", "hedgehog", "lolcats", "mamba2", "rwkv", "gated_delta", "h3")
    for name in mixers:
        assert f"| `{name}` |" in section, name
