"""Checks that results can be written, made before the work begins."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from .short_repr import short_path


def check_output_file(path: str | os.PathLike, write: Callable[[Path], object] = Path.touch):
    """Raises `ValueError` if no file can be written to `path`; the check changes nothing there.

    Args:
        write: a function that writes a test file to the path that it is given, in the way of the results.
    """
    path = _checked(path)
    if os.path.isdir(path):  # unlike `Path`'s own, without an error for a path that is too long
        raise ValueError(f"{short_path(path)} is a folder; name a file.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{short_path(path)} is a device or a pipe; name a file.")
    _check_writable(path, write)


def check_output_folder(path: str | os.PathLike):
    """Raises `ValueError` if `path` is no folder and cannot be made, or if it cannot be written to."""
    path = _checked(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(f"{short_path(path)} is a file; name a folder.")
    _check_writable(path / "file", Path.touch)


def check_image_format(path: str | os.PathLike):
    """Raises `ValueError` for a path whose extension is not that of a format that can be written in colour."""
    extension = Path(path).suffix.lower()
    image_format = Image.registered_extensions().get(extension)
    if image_format not in Image.SAVE:
        raise ValueError(f"{short_path(path)} has no extension of an image that can be written; use .png.")
    try:
        # Some known formats cannot be written, or not in colour.
        Image.new("RGB", (16, 16)).save(io.BytesIO(), image_format)
    except Exception as error:
        raise ValueError(f"Images cannot be written as {extension} ({error}); use .png.") from error


def check_distinct_paths(
    files: Iterable[tuple[str, str | os.PathLike | None]], *others: tuple[str, str | os.PathLike | None]
):
    """Raises `ValueError` if a file to write is one of the `others`, or a folder that contains one.

    Args:
        files, others: options with their paths; `None` for an option that is not given.
    """
    for option, file in files:
        for other, path in others:
            if file is not None and path is not None:
                place = Path(os.path.realpath(path))
                if _checked(file) in (place, *place.parents):
                    raise ValueError(
                        f"{option} and {other} would both be written to {short_path(path)}; name another place for one."
                    )


def _checked(path: str | os.PathLike) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:  # a NUL
        raise ValueError(f"{short_path(path)} is not a valid path: {error}") from error


def _check_writable(path: Path, write: Callable[[Path], object]):
    """Write a file of the same name in a hidden folder in the nearest existing folder."""
    try:
        there = next(folder for folder in path.parents if os.path.lexists(folder))
        if not os.path.isdir(there):
            raise ValueError(f"{short_path(there)} is not a folder, so {short_path(path)} cannot be written.")
        with tempfile.TemporaryDirectory(prefix=".try.", dir=there) as folder:
            trial = Path(folder) / path.relative_to(there)
            trial.parent.mkdir(parents=True, exist_ok=True)
            write(trial)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{short_path(path)} cannot be written: {reason}; use another place.") from error
