"""Folders are written by one process at a time; errors of a full disk."""

import errno
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from supra.checkpoint import files
from supra.checkpoint.files import disk_errors, locked, staged_file, staged_folder
from supra.errors import UserError


@contextmanager
def another_process(folder, hold):
    """Inside, another process holds `folder` by calling `hold`; at the end it is killed."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with hold(folder):
            os.write(told, b".")
            signal.pause()
    os.read(ready, 1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("hold", [locked, staged_folder], ids=["run", "staged"])
def test_a_folder_has_one_writer(tmp_path, hold):
    folder = tmp_path / "out"
    with another_process(folder, hold):
        message = f"another process is writing to {folder}: wait"
        with pytest.raises(UserError, match=message), hold(folder):
            raise AssertionError
        assert os.listdir(tmp_path) == [".out.partial" if hold is staged_folder else "out"]
    with hold(folder):
        pass
    assert os.listdir(tmp_path) == ["out"] and os.listdir(folder) == []


def test_a_file_has_one_writer_and_appears_complete(tmp_path):
    file = tmp_path / "folder" / "out"
    with another_process(file, staged_file):
        message = f"another process is writing to {file}: wait"
        with pytest.raises(UserError, match=message), staged_file(file):
            raise AssertionError
    with staged_file(file) as staging:
        staging.write_bytes(b"whole")
        assert not file.exists()
    assert os.listdir(file.parent) == ["out"] and file.read_bytes() == b"whole"


def test_an_error_leaves_no_part_of_a_file(tmp_path):
    with pytest.raises(KeyError), staged_file(tmp_path / "out") as staging:
        staging.write_bytes(b"half")
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("hold", [locked, staged_folder], ids=["run", "staged"])
def test_an_error_lets_go(tmp_path, hold):
    for _ in range(2):
        with pytest.raises(KeyError), hold(tmp_path / "out"):
            raise KeyError
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_process_left_goes(tmp_path):
    left = tmp_path / ".out.partial"
    (left / "adapter").mkdir(parents=True)
    (left / "adapter" / "model.safetensors").write_text("half")
    (left / "elsewhere").symlink_to(tmp_path)
    with staged_folder(tmp_path / "out") as staging:
        (staging / "config.json").write_text("{}")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["config.json"]


def test_a_link_in_the_place_of_the_staging_folder_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("mine")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "mine")
    with staged_folder(tmp_path / "out"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"]
    assert (tmp_path / "mine" / "precious").read_text() == "mine"


def test_a_folder_that_was_finished_a_moment_ago(tmp_path, monkeypatch):
    """The other process renames its folder after we open it and before we lock it."""
    flock = files.fcntl.flock

    def late(handle, operation):
        os.rename(tmp_path / ".out.partial", tmp_path / "out")
        flock(handle, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with (
        pytest.raises(UserError, match="another process is writing"),
        staged_folder(tmp_path / "out"),
    ):
        raise AssertionError
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("system", ["windows", "disk without locks"])
def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch, system):
    def none(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    if system == "windows":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", none)
    with locked(tmp_path / "out"), locked(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


@contextmanager
def small_files(maximum):
    """Inside, no file can grow beyond `maximum` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (maximum, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "torch": lambda path: torch.save({"a": torch.ones(9999)}, path),
    "safetensors": lambda path: save_file({"a": torch.ones(9999)}, path),
    "text": lambda path: Path(path).write_text("a" * 39999),
}


@pytest.mark.parametrize("most", [10, 20_000, 39_900])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_error_of_the_system(tmp_path, writer, most):
    with small_files(most), pytest.raises(OSError), staged_folder(tmp_path / "out") as staging:
        WRITERS[writer](staging / "file")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("sizes of tensors"), UserError("os error 2")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error), match=str(error)), disk_errors():
        raise error
