"""Which texts are held out for evaluation: a hash decides, so that no list is needed."""

from __future__ import annotations

import hashlib


RESERVED = 10  # one text in this many is held out for evaluation


def is_reserved(text: str) -> bool:
    """Whether a text is held out for evaluation and never trained on."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % RESERVED == 0
