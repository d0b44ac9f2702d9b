"""Atomic writes of files and folders, also if the writing process is killed."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

from .interrupts import uninterrupted


# Files of weights, or their index: all with the same name and variant are replaced together, however many there are.
WEIGHTS = re.compile(r"(.*?)(?:-\d{5}-of-\d{5})?(\.bin|\.safetensors)(?:\.index(.*)\.json)?")
# The flag that swaps two names, the same on both systems.
SWAP = 2


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to `path`, a file or a folder, when the block ends without an
    error.

    The old file or folder stays until the new one is complete, and a symbolic link stays a link: its target is written.
    Missing parent folders are made. After a kill a hidden folder `.NAME.…` with the unfinished or the old files may
    stay beside it.

    >>> with atomic_write("image.png") as partial:
    ...     image.save(partial)

    Raises:
        OSError: if a file would replace a folder, or a folder a file.
    """
    check_path(path)
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a hidden folder, so that the file keeps its name, from which writers of images and videos take the format.
    with _hidden_folder(path, path.parent) as folder:
        partial = folder / path.name
        yield partial
        if partial.is_dir() and path.exists():
            swap_folders(partial, path)
        else:
            partial.replace(path)


@contextmanager
def atomic_folder_write(folder: str | os.PathLike, replaced: Collection[str] = ()) -> Iterator[Path]:
    """An empty folder of the same name to write into; its files replace those in `folder` when the block ends without
    an error.

    Other files in `folder` stay, except old weights if new ones are written. All files are replaced at once, by a swap
    of folders. In a folder that cannot be swapped they are replaced one by one, each atomically: a folder with
    subfolders that are not written, the current one, a mounted one, or on a system without links or the swap.

    Args:
        replaced: names of folders, as `model/adapters`, that do not stay.

    Raises:
        ValueError: for a path that is a file.
    """
    check_path(folder)
    if os.path.isfile(folder):
        raise ValueError(f"{folder} is a file; name a folder to save to.")
    target = Path(os.path.realpath(folder))
    target.mkdir(parents=True, exist_ok=True)
    parent = target.parent if _can_be_swapped(target) else target
    with _hidden_folder(target, parent) as hidden:
        new = hidden / target.name
        new.mkdir()
        yield new
        if parent == target.parent and _link_unchanged_files(target, new, replaced):
            swap_folders(new, target)
        else:
            _move_files(new, target, replaced)


def check_path(path: object):
    """Raises `ValueError` for anything but a path, and for an empty path."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"{path!r:.80} is not a path; name a file or folder.")


def swap_folders(new: Path, old: Path):
    """Swap two folders on one file system, in one step if the system can (Linux, macOS).

    On other systems `old` is renamed for a moment, to the name of `new` with `.old` after it.

    Raises:
        OSError: if `old` is a file.
    """
    if not old.is_dir():
        raise NotADirectoryError(f"{old} is a file; remove it, or use another folder.")
    if not _swap_in_one_step(new, old):
        aside = new.with_name(f"{new.name}.old")
        old.rename(aside)
        try:
            new.rename(old)
        except OSError:
            aside.rename(old)
            raise
        aside.rename(new)


def write_with_fallback(path: str | os.PathLike, write: Callable[[Path], object]):
    """Write the result of long work: `write(partial)` writes the file `path`, or if that fails a file somewhere else.

    Raises:
        OSError: if the file was written somewhere else, or not at all; the message says where and why.
    """
    path = Path(path)
    try:
        with atomic_write(path) as partial:
            write(partial)
    except (OSError, ValueError) as error:
        for folder in (path.parent, Path.cwd(), Path(tempfile.gettempdir())):
            rescued = _free_name(folder / path.name)
            try:
                with atomic_write(rescued) as partial:
                    write(partial)
            except (OSError, ValueError):
                continue
            raise OSError(f"{path} cannot be written ({error}). The result is kept in {rescued}.") from error
        raise


def atomic_save(save_pretrained: Callable, replaced: Collection[str] = ()) -> Callable:
    """Wraps a library's `save_pretrained` so that the folder does not change until all is written; see
    `atomic_folder_write`, also for `replaced`.

    The method raises `ValueError` for a path that is a file.
    """

    @wraps(save_pretrained)
    def save(self, save_directory: str | os.PathLike, *args, **kwargs):
        check_path(save_directory)
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; name a folder to save to.")
        # Several processes write into one folder together.
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 or not kwargs.get("is_main_process", True):
            for name in replaced if kwargs.get("is_main_process", True) else ():
                shutil.rmtree(Path(save_directory) / name, ignore_errors=True)
            return save_pretrained(self, save_directory, *args, **kwargs)
        with atomic_folder_write(save_directory, replaced) as folder:
            written = save_pretrained(self, str(folder), *args, **kwargs)
        if isinstance(written, list | tuple):
            written = type(written)(str(path).replace(str(folder), str(save_directory)) for path in written)
        return written

    return save


@contextmanager
@uninterrupted
def _hidden_folder(path: Path, parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:60]}.", dir=parent) as folder:
        yield Path(folder)


def _swap_in_one_step(first: Path, second: Path) -> bool:
    names = os.fsencode(first), os.fsencode(second)
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return libc.renamex_np(*names, SWAP) == 0
        current = -100  # AT_FDCWD: relative names start from the working folder
        return libc.renameat2(current, names[0], current, names[1], SWAP) == 0
    except (AttributeError, OSError, TypeError):
        return False


def _can_be_swapped(folder: Path) -> bool:
    is_current = Path.cwd().is_relative_to(folder)
    return not (is_current or os.path.ismount(folder)) and os.access(folder.parent, os.W_OK)


def _link_unchanged_files(old: Path, new: Path, replaced: Collection[str]) -> bool:
    """Link the files that stay into the new folder; returns whether all could be linked."""
    folders = [path for path in old.iterdir() if _is_folder(path) and path.name not in replaced]
    if any(not (new / path.name).is_dir() for path in folders):
        return False
    try:
        for path in _unchanged_files(old, new, replaced):
            os.link(path, new / path.name, follow_symlinks=False)
    except (OSError, NotImplementedError):
        return False
    return all(_link_unchanged_files(path, new / path.name, _inside(replaced, path.name)) for path in folders)


def _move_files(new: Path, old: Path, replaced: Collection[str]):
    written = {path.name for path in new.iterdir()}
    kept = {path.name for path in _unchanged_files(old, new, replaced)} | written
    for path in sorted(new.iterdir()):
        if _is_folder(path):
            (old / path.name).mkdir(exist_ok=True)
            _move_files(path, old / path.name, _inside(replaced, path.name))
        else:
            path.replace(old / path.name)
    for path in old.iterdir():
        if not _is_folder(path):
            if path.name not in kept:
                path.unlink()
        elif path.name in replaced and path.name not in written:
            shutil.rmtree(path)


def _unchanged_files(old: Path, new: Path, replaced: Collection[str]) -> list[Path]:
    """The files of the old folder that are not written anew, nor replaced."""
    weights = {_weights(path.name) for path in new.iterdir()} - {None}
    return [
        path
        for path in old.iterdir()
        if not _is_folder(path)
        and path.name not in replaced
        and not os.path.lexists(new / path.name)
        and _weights(path.name) not in weights
    ]


def _weights(name: str) -> tuple[str, str] | None:
    """The name with variant, and the extension, of the weights of which a file holds all, a part, or the index."""
    match = WEIGHTS.fullmatch(name)
    return match and (match[1] + (match[3] or ""), match[2])


def _inside(names: Collection[str], folder: str) -> list[str]:
    """The names inside of a folder, relative to it."""
    return [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _free_name(path: Path) -> Path:
    numbers = iter(range(1, sys.maxsize))
    return next(free for n in numbers if not os.path.lexists(free := path.with_stem(f"{path.stem}.{n}")))
