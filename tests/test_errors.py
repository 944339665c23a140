"""What ends a command: one line, an exit code, and nothing left behind."""

import os
import signal
import sys
import threading
import time

import pytest

from supra.checkpoint.shard_writer import ShardWriter
from supra.cli import main
from supra.errors import Terminated, command, termination
from supra.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors") / "base"
    tiny_checkpoint(folder)
    (folder / "text.txt").write_text("the river runs to the sea. " * 50)
    return folder


CONVERT = "convert --model {base} --out {out}"
DIAGNOSE = "diagnose {rnn} --text {base}/text.txt --to 64 --trained-length 16 --out {out}"


@pytest.fixture(scope="module")
def rnn(base):
    main(["convert", "--model", str(base), "--out", str(base.parent / "rnn")])
    return base.parent / "rnn"


@pytest.mark.parametrize(
    ("words", "number", "code", "line"),
    [
        (CONVERT, signal.SIGTERM, 143, "supra: terminated"),
        (CONVERT, signal.SIGHUP, 129, "supra: terminated"),
        (CONVERT, signal.SIGINT, 130, "supra: interrupted"),
        (DIAGNOSE, signal.SIGTERM, 143, "supra: terminated"),
    ],
)
def test_a_signal_leaves_nothing(
    base, rnn, tmp_path, monkeypatch, capsys, words, number, code, line
):
    """While files are written: the staging folder is removed, and handlers are as before."""
    if words == DIAGNOSE:
        pytest.importorskip("matplotlib", reason="--out draws")

    def kill(*_):
        assert len(list(tmp_path.iterdir())) == 1  # the staging folder
        os.kill(os.getpid(), number)

    monkeypatch.setattr(ShardWriter, "add", kill)
    monkeypatch.setattr("supra.long_context.diagnosis.draw_states", kill)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        main(words.format(base=base, rnn=rnn, out=tmp_path / "out").split())
    assert end.value.code == code
    assert capsys.readouterr().err.strip().splitlines()[-1] == line
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


def test_what_is_ignored_stays_ignored():
    """As for SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_one_ends_the_process():
    """In case cleaning up hangs."""
    with pytest.raises(Terminated), termination():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    "number, raised", [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_one_that_python_ignores_comes_again(number, raised, capsys):
    """Python ignores what is raised in a finalizer."""

    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), number)

    before, hook = signal.getsignal(number), sys.unraisablehook
    with pytest.raises(raised), termination() as received:
        Finalized()  # freed at once
        time.sleep(5)
    assert received == [number]
    assert capsys.readouterr().err == ""
    assert (signal.getsignal(number), sys.unraisablehook) == (before, hook)


def test_a_command_runs_in_another_thread():
    """There Python does not allow signal handlers."""
    done = []
    thread = threading.Thread(target=command(done.append), args=(1,))
    thread.start()
    thread.join()
    assert done == [1]
