"""Locks a folder for one process; the lock ends with the process, however it ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


LOCK_FILE = ".in_use"
_held: set[int] = set()


@contextmanager
def lock_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Locks `folder`, which is made if it is missing, for this process until the block ends.

    It is a lock of the kernel on the file `.in_use` in the folder: it ends with the process at the latest, and forked
    processes do not keep it. The file is removed after the block; after a kill it stays, but is not locked. If the
    system or the file system has no such locks, nothing is locked.

    Raises:
        ValueError: if another process, or another block of this one, has locked the folder.
    """
    path = Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    owner, descriptor = os.getpid(), _acquire(path)
    try:
        yield
    finally:
        if descriptor is not None and os.getpid() == owner:
            path.unlink(missing_ok=True)
            _held.discard(descriptor)
            os.close(descriptor)


def _acquire(path: Path) -> int | None:
    """A descriptor of the locked file; `None` if there are no locks."""
    if fcntl is None:
        return None
    _close_in_forked_processes()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise ValueError(
                f"{path.parent} is in use by {holder or 'another process'}; wait until that has ended, or use another "
                "folder."
            ) from None
        if _is_still_there(descriptor, path):
            break
        os.close(descriptor)  # the process with the lock removed the file after it was opened here
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held.add(descriptor)
    return descriptor


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@cache
def _close_in_forked_processes():
    # Otherwise workers that outlive a killed training for a while would keep its lock.
    os.register_at_fork(after_in_child=lambda: [os.close(descriptor) for descriptor in _held])
