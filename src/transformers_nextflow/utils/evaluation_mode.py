"""A model that samples or scores does so in evaluation mode, whatever mode it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout is off and layers keep their cache: in training mode, gradient checkpointing drops it.

    A model in evaluation mode is not touched.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def in_evaluation_mode(function: Callable) -> Callable:
    """A function, or a method, whose first argument is a model that is in evaluation mode during the call."""

    @wraps(function)
    def run(model: nn.Module, *args, **kwargs):
        with evaluation_mode(model):
            return function(model, *args, **kwargs)

    return run
