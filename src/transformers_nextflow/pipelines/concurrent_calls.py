"""What a call on a pipeline has for itself, and what is put in order after it, whatever ended it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from ..utils.offloading import is_onloaded, one_after_the_other, onloaded


@dataclass
class _Call:
    """A call that runs, or has run last; `stops` counts the requests from outside when it began."""

    stops: int
    is_over: bool = False
    interrupted: bool = False


class _Thread(threading.local):
    """Of each pipeline this thread's calls, the innermost last; of those that are over the last one."""

    def __init__(self):
        self.calls: WeakKeyDictionary[PipelineCallsMixin, list[_Call]] = WeakKeyDictionary()


_THREAD = _Thread()


class PipelineCallsMixin:
    """Calls of a [`NextFlowPipeline`], which may run in several threads, and inside of each other's callbacks."""

    _stops = 0

    @property
    def interrupt(self) -> bool:
        """Whether the call that runs in this thread (else its last one) was asked to stop after the scale at hand."""
        calls = self._calls()
        if not calls:
            return False
        return calls[-1].interrupted or (not calls[-1].is_over and calls[-1].stops != self._stops)

    @property
    def _interrupt(self) -> bool:
        """The request to stop. Set in a callback it is one to the call that the callback belongs to; set outside of
        calls, as by a button in another thread, to all calls that run at the time.
        """
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool):
        calls = self._calls()
        if calls and not calls[-1].is_over:
            calls[-1].interrupted = bool(value)
        elif value:
            self._stops += 1

    def _calls(self) -> list[_Call]:
        return _THREAD.calls.setdefault(self, [])

    @contextmanager
    def _call(self) -> Iterator[None]:
        """One call: the model is where it computes, and goes back to where it waits, however the call ends."""
        calls = self._calls()
        if calls and calls[-1].is_over:
            calls.pop()
        calls.append(_Call(self._stops))
        try:
            with one_after_the_other(self.model):
                is_within_another = is_onloaded(self.model)
                try:
                    # Offloading brings a model when it is called, which most of what a pipeline does never does.
                    with onloaded([self.model]):
                        yield
                finally:
                    if not is_within_another:
                        self.maybe_free_model_hooks()
        finally:
            if len(calls) > 1:
                calls.pop()
            else:
                calls[-1].interrupted, calls[-1].is_over = self.interrupt, True
