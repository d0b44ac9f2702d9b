"""Evaluation mode for models while they sample or score, also in the middle of a training."""

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

# Modules that were in training mode, and for each the number of calls, in all threads, that keep it in evaluation mode.
_HELD: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_GUARD = Lock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode during the block: dropout is off, and gradient checkpointing does not drop the
    cache.

    A model in evaluation mode does not change. With several calls at the same time the last one restores training mode.
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
    """Wraps a function or method so that its first argument, a model, is in evaluation mode during the call."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with evaluation_mode(args[0]):
            return function(*args, **kwargs)

    return run
