"""Checkpoints of earlier versions still load and give the same outputs.

Each folder in tests/files is a converted checkpoint with its logits on some tokens. Folders are
added when the format changes and never written again.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from supra.model.configuration import FORMAT_VERSION

FOLDERS = sorted((Path(__file__).parents[1] / "files").glob("format_*"))


def test_the_current_format_is_kept():
    assert f"format_{FORMAT_VERSION}" in [folder.name for folder in FOLDERS]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@torch.no_grad()
def test_it_loads_and_computes_the_same(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = load_file(folder / "expected.safetensors")
    assert expected["logits"].std() > 0.1
    found = model(expected["tokens"]).logits
    torch.testing.assert_close(found, expected["logits"], atol=1e-5, rtol=1e-5)
