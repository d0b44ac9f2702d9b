"""Imports of packages that extras install."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(name: str, extra: str = "train") -> ModuleType:
    """A module of an extra. Raises a `ValueError` that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"This needs {name}: pip install transformers-nextflow[{extra}].") from error
