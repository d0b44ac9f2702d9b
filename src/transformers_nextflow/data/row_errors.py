"""Errors that name the field of a row in which something is wrong."""

from __future__ import annotations

from torch.utils.data import get_worker_info

from ..utils.field_errors import FieldError


def number_in_stream(index: int) -> int | str:
    """The number of a row of a stream. Each worker of a data loader reads files of its own and counts only their rows;
    a row is then named with its worker.
    """
    worker = get_worker_info()
    return index if worker is None else f"{index} of worker {worker.id}"


class BadRowError(FieldError):
    """A row that cannot be used; `field` is the invalid field, such as `messages[0].content[1].image`."""

    def of_row(self, number: int | str) -> BadRowError:
        """The same error with the row's number or name."""
        return type(self)(f"row {number}, {self.field}", self.problem)


class BadImageError(BadRowError):
    """An image that is missing, cannot be decoded, or has an aspect ratio that no schedule has."""
