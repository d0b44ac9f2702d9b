"""What is kept for evaluation, told by a hash, so that no list of it is needed."""

from __future__ import annotations

import hashlib


RESERVED = 10  # one text in so many is kept for evaluation


def is_reserved(text: str) -> bool:
    """Whether a text is kept for evaluation and never trained on."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % RESERVED == 0
