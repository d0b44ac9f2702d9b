"""Checks values of files and arguments: against types, as of a dataclass, and for numbers that are not finite."""

from __future__ import annotations

import inspect
import math
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from .known_names import check_names
from .short_repr import short_repr


T = TypeVar("T")


def read_typed(kind: type[T], values: Any, what: str) -> T:
    """A dataclass from the values of a file; lists become tuples if it has tuples.

    Raises:
        ValueError: a message that begins with `what`, for anything but a mapping, unknown and missing names, values of
            another type, and values that the class itself refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must hold names with values, got {short_repr(values)}.")
    hints = hints_of(kind)
    check_names(values, [f.name for f in fields(kind)], what)
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{what} lacks {', '.join(missing)}.")
    check_types(values, hints, what)
    try:
        return kind(**{name: _with_tuples(value, hints[name]) for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def hints_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with those of its bases; `Any` for a type that cannot be found out."""
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        known = vars(sys.modules[base.__module__])
        for name, hint in inspect.get_annotations(base).items():
            try:
                hints[name] = eval(hint, dict(known)) if isinstance(hint, str) else hint
            except NameError:
                hints[name] = Any
    return hints


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any], what: str):
    """Raises `ValueError` naming a value that does not have the type of its name in `hints`."""
    for name, value in values.items():
        if name in hints and not is_of_type(value, hints[name]):
            raise ValueError(f"{what}: {name} must be {_describe_type(hints[name])}, got {short_repr(value)}.")


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value has an annotated type. Whole numbers count as numbers, truth values do not; a list counts as a
    tuple, and its text as an `Enum`. Every value has a type that is not known here.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(is_of_type(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        return all(is_of_type(entry, inner[0]) for entry in value) if len(set(inner) - {Ellipsis}) == 1 else True
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            return False
        return len(inner) != 2 or all(is_of_type(k, inner[0]) and is_of_type(v, inner[1]) for k, v in value.items())
    if not isinstance(hint, type):
        return True  # a type whose origin is not known here
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if issubclass(hint, Enum) and isinstance(value, str):
        return value in [member.value for member in hint]
    return isinstance(value, hint)


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


def _with_tuples(value: Any, hint: Any) -> Any:
    is_tuple = get_origin(hint) is tuple or any(get_origin(one) is tuple for one in get_args(hint))
    return tuple(value) if is_tuple and isinstance(value, list) else value


def _describe_type(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "nothing"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe_type(one) for one in get_args(hint))
    if get_origin(hint) in (list, tuple, Sequence):
        several = {int: "whole numbers", float: "numbers", str: "texts"}
        return "a list" + "".join(f" of {several[one]}" for one in get_args(hint)[:1] if one in several)
    if get_origin(hint) is dict or hint is dict:
        kinds = [_describe_type(one) for one in get_args(hint) if one is not Any]
        return "names with values" + (f", {kinds[1]} for {kinds[0]} each" if len(kinds) == 2 else "")
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(str(member.value) for member in hint)}"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, Real]]:
    if isinstance(value, Real):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{name}[{index}]")
