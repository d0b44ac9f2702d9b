"""Ctrl-C and requests to terminate, as an exception that is not lost and leaves no partial files behind."""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TypeVar


Function = TypeVar("Function", bound=Callable)

# Seconds until a request that came at a bad moment is sent again.
LATER = 0.01
_UNINTERRUPTED: set[CodeType] = set()


def uninterrupted(function: Function) -> Function:
    """A function that runs to its end before a request takes effect; for a generator this holds only for its own
    lines.
    """
    _UNINTERRUPTED.add(function.__code__)
    return function


def end_on_termination():
    """Make Ctrl-C and SIGTERM end the process with a `KeyboardInterrupt` that holds the signal's number."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None):
    if _must_wait(frame):
        again = threading.Timer(LATER, _send, [number])
        again.daemon = True
        again.start()
        return
    raise KeyboardInterrupt(number)


def _send(number: int):
    # To the thread that handles signals, which may be waiting for something else.
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)


def _must_wait(frame: FrameType | None) -> bool:
    """Whether an exception would be lost, since Python drops those of finalizers, or would interrupt cleaning up."""
    while frame is not None:
        code = frame.f_code
        if code in _UNINTERRUPTED or code.co_name == "__del__" or code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False
