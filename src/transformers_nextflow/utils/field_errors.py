"""Errors that name where in a value something is wrong."""

from __future__ import annotations

import reprlib
from typing import Any


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


class FieldError(ValueError):
    """A value that cannot be used; `field` says where in it, as `messages[0].content[1].image`."""

    # `problem` may be left out, since processes hand an error on as its whole message.
    def __init__(self, field: str, problem: str = ""):
        message = f"{field}: {problem}" if problem else field
        # A half of a surrogate pair, as in a path, could not be printed.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.field, self.problem = field, problem


def shown(value: Any) -> str:
    """A value as an error shows it: in one line, and cut where it is long."""
    try:
        return " ".join(_REPR.repr(value).split())
    except (ValueError, RecursionError):  # Python writes no numbers of more than 4,300 digits
        return f"a {type(value).__name__} that is too long to show"
