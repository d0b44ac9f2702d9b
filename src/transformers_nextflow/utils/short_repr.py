"""Short texts of values for error messages."""

from __future__ import annotations

import reprlib


class _ShortRepr(reprlib.Repr):
    def repr_instance(self, x, level: int) -> str:
        if hasattr(x, "shape"):
            return f"<{type(x).__name__} of shape {tuple(x.shape)}>"
        return super().repr_instance(x, level)


_short = _ShortRepr()
_short.maxstring = _short.maxother = 80


def short_repr(value) -> str:
    """`repr` in one line: shapes for arrays and tensors, and shortened texts and lists."""
    return _short.repr(value)


def short_path(path) -> str:
    """A path in printable form; the middle of a very long path is cut out."""
    text = str(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= 300 else f"{text[:100]} … {text[-100:]}"
