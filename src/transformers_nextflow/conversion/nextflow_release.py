"""Converter for NextFlow's own release; its key table is empty, since no weights have been published.

To fill it, write the release's key patterns into `NEXTFLOW_KEYS`, then read, map, check and write as `tokenflow_t2i.py`
does.
"""

from __future__ import annotations

from pathlib import Path

from .checkpoints import KeyMap
from .report import layout_of


# The release's key → ours, each `*` for any text.
NEXTFLOW_KEYS: dict[str, str] = {}


def check_release(file: Path):
    """Raises `ValueError` that names the keys of a file of the release which the key table lacks."""
    if not NEXTFLOW_KEYS:
        raise ValueError("NEXTFLOW_KEYS is empty, since there is no release yet; fill it from the list of tensors.")
    KeyMap(NEXTFLOW_KEYS).forward(layout_of(file))
