"""Errors that name where in a row something is wrong."""

from __future__ import annotations

from ..utils.field_errors import FieldError


class BadRowError(FieldError):
    """A row that cannot be used; `field` says where in it, as `messages[0].content[1].image`."""

    def of_row(self, number: int | str) -> BadRowError:
        """The same error, named with the row's number, or how else it is told."""
        return type(self)(f"row {number}, {self.field}", self.problem)


class BadImageError(BadRowError):
    """An image that is missing, does not decode, or has a ratio that is not drawn."""
