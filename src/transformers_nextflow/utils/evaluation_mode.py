"""A model that samples or scores does so in evaluation mode, whatever mode it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Lock
from typing import ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn


P = ParamSpec("P")
R = TypeVar("R")

# Modules that were training, and how many calls, in whatever threads, keep each of them in evaluation mode.
_HELD: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_GUARD = Lock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout is off and layers keep their cache: in training mode, gradient checkpointing drops it.

    A model in evaluation mode is not touched. Of calls at the same time the last one brings training mode back.
    """
    with _GUARD:
        held = [module for module in model.modules() if module.training or module in _HELD]
        for module in held:
            _HELD[module] = _HELD.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _GUARD:
            for module in held:
                _HELD[module] -= 1
                if not _HELD[module]:
                    del _HELD[module]
                    module.training = True


def in_evaluation_mode(function: Callable[P, R]) -> Callable[P, R]:
    """A function, or a method, whose first argument is a model that is in evaluation mode during the call."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with evaluation_mode(args[0]):
            return function(*args, **kwargs)

    return run
