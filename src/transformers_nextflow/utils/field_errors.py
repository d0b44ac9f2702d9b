"""Errors that name the invalid field of a value."""

from __future__ import annotations

import reprlib
from typing import Any


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


class FieldError(ValueError):
    """A value that cannot be used; `field` is the invalid field, such as `messages[0].content[1].image`."""

    # `problem` may be left out, since errors that cross processes are made again from their whole message.
    def __init__(self, field: str, problem: str = ""):
        message = f"{field}: {problem}" if problem else field
        # Half of a surrogate pair, which a path may hold, could not be printed.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.field, self.problem = field, problem


def abbreviate(value: Any) -> str:
    """A value for an error message: in one line, and shortened if it is long."""
    try:
        return " ".join(_REPR.repr(value).split())
    except (ValueError, RecursionError):  # Python prints no numbers of more than 4,300 digits
        return f"a {type(value).__name__} that is too long to show"
