"""Stores that fsspec knows: sources with addresses such as s3://bucket/images, and folders to which shards are
written.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ..utils.atomic_files import atomic_write
from ..utils.extras import import_extra
from ..utils.short_repr import short_path
from ..utils.unique_names import load_json
from .row_errors import BadImageError, BadRowError


# The file with texts beside a folder's images, by the convention of `datasets`.
METADATA = "metadata.jsonl"
STORED_KINDS = f"a .parquet or .tar file, a folder of those, or a folder of images with {METADATA}"


def is_address(place: object) -> bool:
    """Whether a place is an address, as s3://bucket/images, and no path of this machine."""
    return re.match(r"[A-Za-z][\w+.-]*:", str(place)) is not None and "://" in str(place)


def without_file_scheme(place: Any) -> Any:
    """A place; for a file:// address its path."""
    return open_store(place)[1] if str(place).startswith("file://") else place


def open_store(address: object) -> tuple[Any, str]:
    """The store of an address, and the place in it.

    Raises:
        ValueError: for a scheme that fsspec does not know, that needs another package, or that makes no store.
    """
    fsspec = import_extra("fsspec")
    try:
        return fsspec.core.url_to_fs(str(address))
    except Exception as error:  # stores are reached or read here already, and raise what comes
        raise ValueError(f"{short_path(str(address))} cannot be opened: {error}") from error


def list_store_files(source: str) -> tuple[str, list[str]]:
    """The kind of an address ("parquet", "webdataset" or "images"), and the addresses of its files.

    Raises:
        ValueError: for anything else, and for a store that cannot be reached.
    """
    system, place = open_store(source)
    kinds = {".parquet": "parquet", ".tar": "webdataset"}
    with store_errors(source, ValueError):
        if PurePosixPath(place).suffix in kinds:
            found = [place] if system.exists(place) else system.glob(place)
        else:
            found = system.ls(place, detail=False) if system.isdir(place) else []
    for suffix, kind in kinds.items():
        if files := [path for path in found if path.endswith(suffix) and not path.endswith("/metadata.parquet")]:
            return kind, sorted(system.unstrip_protocol(path) for path in files)
    if any(PurePosixPath(path).name == METADATA for path in found):
        return "images", [source]
    raise ValueError(f"{short_path(source)} is not {STORED_KINDS}; nothing else is read from a store.")


@contextmanager
def store_errors(address: str, kind: type[Exception]) -> Iterator[None]:
    """Turns the errors of stores, which are of many kinds, into one kind that names the address."""
    try:
        yield
    except FileNotFoundError as error:
        if kind is OSError:
            raise
        raise kind(f"There is nothing at {short_path(address)}.") from error
    except (BadRowError, ValueError):
        raise
    except Exception as error:
        raise kind(f"{short_path(address)} cannot be reached: {str(error) or type(error).__name__}") from error


class StoredImages(Sequence):
    """The rows of a folder of images in a store; an image is downloaded when its row is read."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self.system, self.place = open_store(self.address)
        with store_errors(address, ValueError):
            lines = self.system.cat_file(f"{self.place}/{METADATA}").splitlines()
        self.lines = [line for line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict:
        try:
            row = load_json(self.lines[index])
        except (ValueError, RecursionError) as error:
            raise BadRowError("row", f"is not valid JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(name := row.get("file_name"), str):
            raise BadRowError("file_name", "must be the name of an image")
        try:
            with store_errors(f"{self.address}/{name}", OSError):
                content = self.system.cat_file(str(PurePosixPath(self.place, name)))
        except FileNotFoundError as error:
            raise BadImageError("file_name", f"There is no image {self.address}/{name}") from error
        return row | {"file_name": {"bytes": content, "path": None}}


class LocalFolder:
    """A folder of this machine to which shards are written."""

    def __init__(self, path: str | Path):
        # Other processes may have another working folder.
        self.path = Path(path).absolute()

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        """The names of its files; empty for a folder that does not exist."""
        return sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []

    def read(self, name: str) -> bytes:
        """The content of a file. Raises `FileNotFoundError` if it does not exist."""
        return (self.path / name).read_bytes()

    def write(self, name: str, write: Callable[[Path], object]):
        """Write a file atomically: `write` writes it to the path that it is given."""
        with atomic_write(self.path / name) as partial:
            write(partial)


class StoredFolder:
    """The same in a store. Files are made on this machine and then uploaded."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self.system, self.place = open_store(self.address)

    def __str__(self) -> str:
        return self.address

    def names(self) -> list[str]:
        self.system.invalidate_cache()
        with store_errors(self.address, OSError):
            try:
                return sorted(PurePosixPath(path).name for path in self.system.ls(self.place, detail=False))
            except FileNotFoundError:
                return []

    def read(self, name: str) -> bytes:
        with store_errors(f"{self.address}/{name}", OSError):
            return self.system.cat_file(f"{self.place}/{name}")

    def write(self, name: str, write: Callable[[Path], object]):
        with tempfile.TemporaryDirectory() as folder, store_errors(f"{self.address}/{name}", OSError):
            write(Path(folder) / name)
            self.system.makedirs(self.place, exist_ok=True)
            self.system.put_file(str(Path(folder) / name), f"{self.place}/{name}")


Folder = LocalFolder | StoredFolder


def open_folder(place: Any) -> Folder:
    """The folder of a path or an address. Raises `ValueError` for an address that cannot be opened."""
    place = without_file_scheme(place)
    return StoredFolder(str(place)) if is_address(place) else LocalFolder(place)
