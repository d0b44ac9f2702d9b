"""Registries of objects by name: a new entry is one line, and its module is imported on access."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any


class Registry(Mapping[str, Any]):
    """Names of objects of one `kind`, each with its place "package.module:attribute".

    >>> suites = Registry("suite", {"shapes": "transformers_nextflow.worlds.shapes.evaluation:evaluate_shapes"})
    >>> evaluate = suites["shapes"]
    """

    def __init__(self, kind: str, places: Mapping[str, str]):
        self.kind, self.places = kind, dict(places)

    def __getitem__(self, name: str) -> Any:
        """Raises `ValueError` for a name that is not in the table."""
        if name not in self.places:
            raise ValueError(f"There is no {self.kind} {name!r}; choose one of {', '.join(self.places)}.")
        module, _, attribute = self.places[name].partition(":")
        return getattr(import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
