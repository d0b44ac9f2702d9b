"""The lock of a folder: who holds it, and what ends it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from transformers_nextflow.utils import folder_lock
from transformers_nextflow.utils.folder_lock import LOCK_FILE, lock_folder


# Loads the module by its file: the package would take seconds.
HOLDER = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("folder_lock", {folder_lock.__file__!r})
folder_lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(folder_lock)
with folder_lock.lock_folder(sys.argv[1]):
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.write(1, b"%d\\n" % os.getpid())
        time.sleep(60)
        os._exit(0)
    os.write(1, b"held\\n")
    time.sleep(60)
"""


def holder(folder: Path, kind: str = "plain") -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(folder), kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_folder_is_held_by_one_block_at_a_time_and_nothing_of_it_stays(tmp_path):
    folder = tmp_path / "run"
    for _ in range(2):
        with lock_folder(folder):
            message = f"{folder} is in use by process {os.getpid()} on .*; wait until that has ended"
            with pytest.raises(ValueError, match=message), lock_folder(folder):
                pass
            assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
        assert not list(folder.iterdir())


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
    process = holder(tmp_path)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on"), lock_folder(tmp_path):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with lock_folder(tmp_path):
        pass
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_worker_that_outlives_its_killed_training_does_not_keep_the_lock(tmp_path):
    process = holder(tmp_path, "fork")
    lines = {process.stdout.readline().strip() for _ in range(2)}
    worker = int((lines - {"held"}).pop())
    try:
        process.kill()
        process.wait()
        os.kill(worker, 0)  # raises if it has ended
        with lock_folder(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_that_its_holder_removes_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    with lock_folder(tmp_path):
        stale = os.open(tmp_path / LOCK_FILE, os.O_RDWR)
    opened, real = [], os.open

    def open_stale_first(path, *args, **kwargs):
        opened.append(path)
        return stale if len(opened) == 1 else real(path, *args, **kwargs)

    monkeypatch.setattr(folder_lock.os, "open", open_stale_first)
    with lock_folder(tmp_path):
        assert len(opened) == 2
        with pytest.raises(ValueError, match="in use"), lock_folder(tmp_path):
            pass


def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder_lock.fcntl, "flock", unsupported)
    with lock_folder(tmp_path), lock_folder(tmp_path):
        pass
    monkeypatch.setattr(folder_lock, "fcntl", None)
    with lock_folder(tmp_path), lock_folder(tmp_path):
        pass
