"""Reading of images in all forms in which they may be given: they are found, limited in size and decoded here."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.request import Request, urlopen

from PIL import Image, UnidentifiedImageError

from .short_repr import short_path, short_repr


IMAGE_KINDS = "a PIL image, a path, a URL, bytes, an open file, base64"
# Limits for a file from the web.
MAX_SECONDS, MAX_BYTES = 60, 2**28
# A text of at least this length that is no file counts as base64.
SHORTEST_BASE64 = 64


def read_image(source: Any, max_pixels: int | None = None, formats: tuple[str, ...] | None = None) -> Image.Image:
    """A decoded image as it is stored: in its own mode and orientation, and the first of several frames.

    Args:
        source: a PIL image, a path, an http(s) URL, bytes, an open file, or base64 with or without `data:image/…`.
        max_pixels: the largest number of pixels of a file; default: `PIL.Image.MAX_IMAGE_PIXELS`.
        formats: allowed formats of files, by PIL's names; default: all that PIL reads.

    Raises:
        ValueError: naming it, for a source that does not exist, is no image, is damaged, is a folder, a pipe or a
            device, has more pixels than `max_pixels`, or has another type.
    """
    limits = (max_pixels, formats)
    if isinstance(source, Image.Image):
        return _decoded(source, short_path(getattr(source, "filename", "") or "the image"), *limits)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decoded(io.BytesIO(source), f"what the {len(bytes(source))} bytes hold", *limits)
    if hasattr(source, "read"):
        return _decoded(_seekable(source), short_path(getattr(source, "name", "the open file")), *limits)
    if isinstance(source, str):
        if re.match(r"[a-z][a-z0-9+.]+://", source, re.IGNORECASE):
            return _decoded(io.BytesIO(_fetched(source)), short_path(source), *limits)
        if (content := _from_base64(source)) is not None:
            return _decoded(io.BytesIO(content), "the base64", *limits)
    elif not isinstance(source, os.PathLike):
        raise ValueError(f"it is {short_repr(source)}, not {IMAGE_KINDS}, an array or a tensor.")
    return _decoded(regular_file(source), short_path(source), *limits)


def open_image(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """The image in a file, not decoded. Raises `ValueError`, naming it, for anything else."""
    if not (hasattr(source, "read") or isinstance(source, str | os.PathLike)):
        raise ValueError(f"{short_repr(source)} is neither a path nor an open file; name the file of an image.")
    name = short_path(getattr(source, "name", "the open file") if hasattr(source, "read") else source)
    try:
        return Image.open(source if hasattr(source, "read") else regular_file(source))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def regular_file(path: str | os.PathLike, kind: str = "image") -> Path:
    """The path of a file. Raises `ValueError` if it does not exist, or is a folder, a pipe or a device."""
    shown = short_path(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise ValueError(f"{shown} cannot be read: {error.strerror}.") from error
        raise ValueError(f"There is no {kind} file {shown}.") from error
    if stat.S_ISDIR(mode):
        raise ValueError(f"{shown} is a folder; name a file.")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{shown} is a pipe or a device, which is not read; save it as a file first.")
    return Path(path)


def check_pixels(width: int, height: int, name: str, most: int | None = None):
    """Raises `ValueError` for more than `most` pixels; default: `PIL.Image.MAX_IMAGE_PIXELS`, PIL's own guard against
    decompression bombs, of which it only warns.
    """
    limit = Image.MAX_IMAGE_PIXELS if most is None else most
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{name} has {width}x{height} pixels, and at most {limit} are read, since a small file may hold more than "
            f"the memory does; make it smaller{', or raise PIL.Image.MAX_IMAGE_PIXELS' if most is None else ''}."
        )


def _decoded(
    source: Image.Image | io.BytesIO | Path, name: str, max_pixels: int | None, formats: tuple[str, ...] | None
) -> Image.Image:
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=formats)
        if getattr(image, "format", None) == "EPS":
            raise ValueError("EPS is drawn by another program, which is not run; save it as PNG")
        if image is not source:
            check_pixels(*image.size, name, max_pixels)
        image.load()
        # Otherwise the file would stay open.
        return image.copy() if getattr(image, "is_animated", False) else image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is refused: {error} Make it smaller.") from error
    except UnidentifiedImageError as error:
        kind = "it is no image of a known kind" if formats is None else f"it is none of {', '.join(formats)}"
        raise ValueError(f"{name} cannot be read as an image: {kind}.") from error
    except Exception as error:  # PIL's decoders raise many kinds of errors for broken files
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name} cannot be read as an image: {str(error) or type(error).__name__}") from error


def _seekable(file: Any) -> io.BytesIO | Any:
    try:
        if file.seekable():
            return file
        content = file.read()
    except (AttributeError, OSError, ValueError) as error:
        raise ValueError(f"The open file cannot be read: {error}") from error
    if not isinstance(content, bytes):
        raise ValueError("The open file gives text; open it in binary mode, 'rb'.")
    return io.BytesIO(content)


def _fetched(url: str) -> bytes:
    end, content = time.monotonic() + MAX_SECONDS, b""
    try:
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError("only http and https are")
        request = Request(url, headers={"User-Agent": "transformers-nextflow"})
        with urlopen(request, timeout=MAX_SECONDS) as response:
            while part := response.read(2**20):
                content += part
                if len(content) > MAX_BYTES or time.monotonic() > end:
                    raise ValueError(f"it takes more than {MAX_BYTES} bytes or {MAX_SECONDS} seconds")
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"{short_path(url)} cannot be fetched as an image: {error}.") from error
    return content


def _from_base64(text: str) -> bytes | None:
    """The bytes of a text in base64; `None` for a text that is more likely the path of a file."""
    is_told = text.startswith("data:")
    content = text.partition(",")[2] if is_told else text
    if not is_told and (len(text) < SHORTEST_BASE64 or not re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", text)):
        return None
    try:
        if not is_told and os.path.exists(text):
            return None
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        if is_told:
            raise ValueError(f"{short_repr(text)} holds no base64: {error}.") from error
        return None
