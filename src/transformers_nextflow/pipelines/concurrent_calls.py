"""The state of a single call on a pipeline, and the cleaning up after it, even if it fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from ..utils.offloading import is_onloaded, one_thread_if_offloaded, onload_weights


@dataclass
class _Call:
    """A call that runs or was the last to run; `stops` is the number of requests to stop from outside when it began."""

    stops: int
    is_over: bool = False
    interrupted: bool = False


class _Thread(threading.local):
    """For each pipeline the calls that run in this thread, the innermost last; if none runs, the last one."""

    def __init__(self):
        self.calls: WeakKeyDictionary[PipelineCallsMixin, list[_Call]] = WeakKeyDictionary()


_THREAD = _Thread()


class PipelineCallsMixin:
    """Calls of a [`NextFlowPipeline`], which may run in several threads, and within callbacks of other calls."""

    _stops = 0

    @property
    def interrupt(self) -> bool:
        """Whether the call in this thread (if none runs, the last one) was asked to stop after the current scale."""
        calls = self._calls()
        if not calls:
            return False
        return calls[-1].interrupted or (not calls[-1].is_over and calls[-1].stops != self._stops)

    @property
    def _interrupt(self) -> bool:
        """The request to stop. Set in a callback, it stops the call of that callback; set outside of calls, such as by
        a button in another thread, it stops all calls that are running.
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
        """One call: an offloaded model is moved to the device that computes, and back afterwards, even after an
        error.
        """
        calls = self._calls()
        if calls and calls[-1].is_over:
            calls.pop()
        calls.append(_Call(self._stops))
        try:
            with one_thread_if_offloaded(self.model):
                is_within_another = is_onloaded(self.model)
                try:
                    # Offloading moves a model when its `forward` is called, but the pipeline mostly calls other
                    # methods.
                    with onload_weights([self.model]):
                        yield
                finally:
                    if not is_within_another:
                        self.maybe_free_model_hooks()
        finally:
            if len(calls) > 1:
                calls.pop()
            else:
                calls[-1].interrupted, calls[-1].is_over = self.interrupt, True
