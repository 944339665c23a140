"""The signals that end a run between two steps."""

import os
import signal

import pytest

from supra.uptrain.stop import ENDING, WARNING, noted


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ENDING + WARNING)
def test_a_signal_is_noted(number):
    before = signal.getsignal(number)
    with noted(ENDING + WARNING) as received:
        assert not received
        send(number)
        assert received == [number]
    assert signal.getsignal(number) == before


def test_a_second_signal_has_its_usual_effect():
    with pytest.raises(KeyboardInterrupt), noted(ENDING, once=True) as received:
        send(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        send(signal.SIGINT)


def test_a_warning_may_come_at_any_time():
    """Twice, before SIGTERM and after it: none of them ends the process."""
    with noted(WARNING) as warnings, noted(ENDING, once=True) as endings:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            send(number)
    assert len(warnings) == 3 and endings == [signal.SIGTERM]
