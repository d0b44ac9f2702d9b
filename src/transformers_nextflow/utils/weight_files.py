"""Files of tensors: safetensors, and pickles that hold nothing but tensors and plain values."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .checkpoint_checks import unsafe_pickle


State = dict[str, torch.Tensor]


def read_state_dict(path: Path | str, allowed: Iterable[type] = ()) -> State:
    """All tensors of one file: .safetensors, or a pickle (.pt, .pth, .bin, …) that holds tensors and plain values.

    Args:
        path: the file.
        allowed: classes beyond torch's own that a pickle may hold.

    Raises:
        ValueError: if the file is not there, damaged, or a pickle with other code in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}, or it is a pipe or a device.")
    if path.suffix == ".json":
        raise ValueError(f"{path} holds no weights; give the folder that it is in.")
    if path.suffix == ".safetensors":
        with safetensors_errors(path):
            return load_file(path)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error) and not _begins_as_pickle(path):
            raise ValueError(f"{path} cannot be read; is it complete, or a pointer of Git LFS?") from error
        raise ValueError(unsafe_pickle(path, error)) from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, AttributeError) as error:
        # torch takes what is no archive for an old pickle, and stumbles over its bytes in many ways.
        raise ValueError(f"{path} cannot be read; is it complete? {error}") from error


def _begins_as_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1) == pickle.PROTO


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """What safetensors says to a file as a `ValueError` that names it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read; is it complete? {error}") from error
