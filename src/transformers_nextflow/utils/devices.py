"""Devices by the names that users give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from .short_repr import short_repr


Movable = TypeVar("Movable")


def on_device(model: Movable, device: str | torch.device | None = None) -> Movable:
    """A model or a pipeline, moved to a device; default: a GPU if there is one.

    Raises:
        ValueError: for a device that does not exist, or that holds no values.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with usable_device(device):
        return model.to(device)


@contextmanager
def usable_device(device: str | int | torch.device) -> Iterator[None]:
    """Turns torch's errors when something is moved to a device into a `ValueError` that names it.

    Raises:
        ValueError: for a device that does not exist, or that holds no values.
    """
    try:
        asked = torch.device(device)
        if asked.type == "meta":
            raise ValueError("it holds no numbers; use cpu or cuda:0.")
        if asked.type == "cpu" and asked.index:  # torch would accept any number
            raise ValueError("there is one cpu; use cpu.")
        yield
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"Device {short_repr(device)} cannot be used; is it cpu, or cuda:0? {error}") from error
