"""Fixtures for tests of training."""

import datasets
import pytest
import torch


@pytest.fixture
def one_thread():
    """torch on one thread, so that sums have the same order in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of its own for `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
