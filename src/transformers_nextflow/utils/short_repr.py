"""What an error shows of a value that it refuses."""

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
    """`repr` in a line: arrays and tensors by their shape, long texts and lists cut."""
    return _short.repr(value)


def short_path(path) -> str:
    """A path as it can be printed; the middle of a very long one is cut."""
    text = str(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= 300 else f"{text[:100]} … {text[-100:]}"
