"""Where a model computes, by the name that a user gives."""

from __future__ import annotations

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
    try:
        if torch.device(device).type == "meta":
            raise ValueError("it holds no numbers; take cpu or cuda:0.")
        return model.to(device)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"Device {short_repr(device)} cannot be used: {error}") from error
