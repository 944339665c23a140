"""The signals that end a run between two steps."""

import os
import signal

import pytest

from supra.uptrain.stop import stop_signals

NUMBERS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_asks_for_a_stop(number):
    before = [signal.getsignal(x) for x in NUMBERS]
    with stop_signals() as asked:
        assert not asked()
        send(number)
        assert asked()
    assert [signal.getsignal(x) for x in NUMBERS] == before


def test_a_second_signal_has_its_usual_effect():
    with pytest.raises(KeyboardInterrupt), stop_signals() as asked:
        send(signal.SIGTERM)
        assert asked()
        send(signal.SIGINT)


def test_a_warning_may_come_at_any_time():
    """Twice, before SIGTERM and after it: none of them ends the process."""
    with stop_signals() as asked:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            send(number)
            assert asked()
