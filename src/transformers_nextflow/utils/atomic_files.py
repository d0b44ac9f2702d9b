"""Files and folders that are whole or not there, whatever ends the process that writes them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Where to write what becomes `path`, a file or a folder, when the block ends without an error.

    What `path` held stays until then. The folder around it is made if it lacks. After a kill a hidden folder
    `.NAME.…` with the unfinished part may stay beside it.

    >>> with write_whole("image.png") as partial:
    ...     image.save(partial)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, so that it keeps its name: writers of images and videos read the format from it.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        if partial.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # a folder cannot take the place of one that is not empty
        partial.replace(path)
