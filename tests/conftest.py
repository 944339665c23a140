"""Offline, one thread a process, Triton interpreted if nothing else is asked for, one seed."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # small tensors on two busy cores: two threads took 3x longer
# read when a kernel is defined: before any import of one; 0 runs kernels on a GPU
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# nohup ignores SIGHUP and a shell ignores SIGINT of what it runs in the background; tests send both
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
