"""Where a model computes, by the name that a user gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from .short_repr import short_repr


Movable = TypeVar("Movable")


def on_device(model: Movable, device: str | torch.device | None = None) -> Movable:
    """A model or a pipeline on a device; default: a GPU where there is one.

    Raises:
        ValueError: for a device that there is not, or that holds no numbers.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with usable_device(device):
        return model.to(device)


@contextmanager
def usable_device(device: str | int | torch.device) -> Iterator[None]:
    """What torch says where something is brought to a device becomes a `ValueError` that names it.

    Raises:
        ValueError: for a device that there is not, or that holds no numbers.
    """
    try:
        asked = torch.device(device)
        if asked.type == "meta":
            raise ValueError("it holds no numbers; take cpu or cuda:0.")
        if asked.type == "cpu" and asked.index:  # torch would take any number
            raise ValueError("there is one cpu; take cpu.")
        yield
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"Device {short_repr(device)} cannot be used; is it cpu, or cuda:0? {error}") from error
