"""Check of all numbers in settings, also in nested lists and dicts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Any

from .short_repr import short_repr


def is_finite_number(value: Real) -> bool:
    """Whether a number is neither NaN nor infinite, nor beyond all floats, as whole ones may be."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_finite(settings: dict[str, Any]):
    """Raises `ValueError` that names a number in the settings, or in lists and dicts in them, that is not finite."""
    for name, value in _numbers(settings):
        if not is_finite_number(value):
            raise ValueError(f"{name} must be a finite number, got {short_repr(value)}.")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, Real]]:
    if isinstance(value, Real):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{name}[{index}]")
