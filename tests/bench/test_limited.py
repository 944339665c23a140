"""Calls in another process: results, errors, crashes and time limits."""

import operator
import os
import time

import pytest

from supra.bench.limited import Failed, OutOfTime, Worker

SECONDS = 100


@pytest.fixture
def worker(tmp_path):
    worker = Worker(tmp_path / "log.txt", {"SUPRA_GREETING": "hello"})
    yield worker
    worker.close()


def test_calls_share_a_process_until_one_fails(worker):
    first, again = (worker.call(os.getpid, (), SECONDS) for _ in range(2))
    assert first == again != os.getpid()
    assert worker.call(os.getenv, ("SUPRA_GREETING",), SECONDS) == "hello"
    with pytest.raises(Failed, match=r"^ZeroDivisionError: division by zero$"):
        worker.call(operator.truediv, (1, 0), SECONDS)
    assert worker.call(os.getpid, (), SECONDS) != first
    assert "Traceback" in worker.log.read_text()
    assert "SUPRA_GREETING" not in os.environ


def test_a_crash_and_a_hang_cost_one_call(worker):
    with pytest.raises(Failed, match=r"^the process ended with SIGABRT$"):
        worker.call(os.abort, (), SECONDS)
    with pytest.raises(Failed, match=r"^the process ended with exit code 3$"):
        worker.call(os._exit, (3,), SECONDS)
    assert worker.call(os.getpid, (), SECONDS) > 0
    started = time.monotonic()
    with pytest.raises(OutOfTime, match=r"^took more than 0\.3 s$"):
        worker.call(time.sleep, (SECONDS,), 0.3)
    assert time.monotonic() - started < SECONDS / 2
    assert worker.call(abs, (-2,), SECONDS) == 2
