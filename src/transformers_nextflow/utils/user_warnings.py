"""Warnings that name the line of whoever called, whatever lies between."""

from __future__ import annotations

import sys
import warnings


# Decorators, trainers and loaders of these call what warns.
BETWEEN = ("transformers_nextflow", "torch", "transformers", "diffusers", "accelerate", "peft", "trl", "contextlib")


def warn_user(message: str):
    """A `UserWarning` at the line that called into this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_between(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_between(frame) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN
