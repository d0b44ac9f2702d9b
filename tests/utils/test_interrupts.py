"""A request to end the process is not lost, whatever the process is doing when it comes."""

import os
import shutil
import signal
import time
import weakref

import pytest

from transformers_nextflow.utils.atomic_files import atomic_write
from transformers_nextflow.utils.interrupts import end_on_termination, uninterrupted


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    end_on_termination()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait():
    """Where the interrupt takes effect; it comes soon."""
    start = time.monotonic()
    try:
        time.sleep(20)
    finally:
        assert time.monotonic() - start < 10


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_request_during_a_finalizer_takes_effect_after_it():
    ended = []

    class Closed:
        def __del__(self):
            terminate()
            ended.append(True)

    with pytest.raises(KeyboardInterrupt) as interrupt:
        Closed()
        wait()
    assert ended and interrupt.value.args == (signal.SIGTERM,)


def test_so_does_one_during_what_a_weak_reference_calls():
    ended = []

    class Closed:
        pass

    def close():
        terminate()
        ended.append(True)

    closed = Closed()
    weakref.finalize(closed, close)
    with pytest.raises(KeyboardInterrupt):
        del closed
        wait()
    assert ended


def test_a_function_that_is_not_interrupted_runs_to_its_end():
    ended = []

    @uninterrupted
    def clear_up():
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt) as interrupt:
        clear_up()
        wait()
    assert ended and interrupt.value.args == (signal.SIGINT,)


def test_a_request_while_a_partial_file_is_cleared_away_leaves_nothing(tmp_path, monkeypatch):
    remove = shutil.rmtree

    def slow(*args, **kwargs):
        terminate()
        remove(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", slow)
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(tmp_path / "file") as partial:
            partial.write_text("new")
        wait()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
