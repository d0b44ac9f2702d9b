"""Checks of a checkpoint's files: weights must be complete, finite and floats, configs must be JSON objects."""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from .known_names import check_names
from .short_repr import short_path
from .unique_names import load_json


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Files in which the last of several equal names would silently be used.
SETTINGS = ("*config.json", "adapters.json", "model_index.json")
SAFETENSORS_FLOATS = dict(zip(("F64", "F32", "BF16", "F16"), FLOATS))
# Entries of pipelines' and models' configs that are no values of the config.
LOADING_NAMES = ("model", "processor", "diffusion_decoder", "dtype", "torch_dtype", "device_map", "revision", "token")
# The largest number of tensors that an error names.
MAX_NAMED = 5


@contextmanager
def loading_errors(folder: object) -> Iterator[None]:
    """Turns errors of libraries about the files of a checkpoint into a `ValueError` that names it.

    Errors of the system, which name their file, of memory, and of missing packages are not changed.
    """
    try:
        yield
    except OSError as error:
        if str(folder) not in str(error):
            error.add_note(f"It was looked for as {short_path(folder)}.")
        raise
    except (ImportError, MemoryError, ValueError, torch.OutOfMemoryError):
        raise
    except TypeError as error:
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            check_names([unknown[1]], LOADING_NAMES, "from_pretrained")
        raise damaged(folder, error) from error
    except pickle.UnpicklingError as error:
        raise ValueError(unsafe_pickle(folder, error)) from error
    except Exception as error:
        raise damaged(folder, error) from error


def damaged(folder: object, error: Exception) -> ValueError:
    """The error in place of a library's error that a user would not understand."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(
        f"{short_path(folder)} cannot be loaded: a file in it is damaged, or its config belongs to other files. "
        f"{reason}"
    )


def unsafe_pickle(path: object, error: Exception) -> str:
    """The message for a pickle that holds more than tensors; torch's own message advises to open it nevertheless."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return (
        f"{short_path(path)} is not a pickle of only tensors and was not opened: it holds "
        f"{found[1] if found else 'more'}. If you trust it, save its tensors as safetensors."
    )


def check_settings(folder: str | os.PathLike):
    """Raises `ValueError` for an existing file of settings in a folder that holds a name twice, or no object."""
    for pattern in SETTINGS:
        for file in Path(folder).glob(pattern):
            read_json(file)


def check_index(folder: str | os.PathLike):
    """Raises `ValueError` for an index of weights in a folder that names files outside of it, or is invalid."""
    for file in Path(folder).glob("*.index*.json"):
        names = read_json(file).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(
                f"{file} is not an index of weights: it has no weight_map from names to files; fetch it again."
            )
        if outside := sorted({name for name in names.values() if not name or os.path.basename(name) != name}):
            raise ValueError(
                f"{file} names {_first_of(outside)}, outside of its folder; fetch it again from its source."
            )


def check_shapes(model: nn.Module, files: Iterable[str]):
    """Raises `ValueError` naming tensors in files of safetensors whose shapes differ from the model's, or if the files
    hold less than half of what it needs: making random values for the rest may take long, only to be refused
    afterwards.
    """
    stored, files, expected, wrong = 0, [Path(file) for file in files], model.state_dict(), []
    if any(file.suffix != ".safetensors" or file.name.startswith("adapter_") for file in files):
        return
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                shape = tensors.get_slice(name).get_shape()
                stored += math.prod(shape)
                if name in expected and shape != list(expected[name].shape):
                    wrong.append(f"{name} {tuple(shape)} instead of {tuple(expected[name].shape)}")
    if wrong:
        raise ValueError(f"The checkpoint holds {_first_of(wrong)}; does the config belong to it?")
    needed = sum(parameter.numel() for parameter in model.parameters())
    if 2 * stored < needed:
        raise ValueError(
            f"The checkpoint holds {stored} numbers, and a model of its config {needed}; does the config belong to it?"
        )


def check_complete(missing: Collection[str]):
    """Raises `ValueError` naming the tensors that a checkpoint lacks."""
    if missing:
        raise ValueError(f"The checkpoint lacks {_first_of(missing)}; is it complete, and does its config fit?")


def check_weights(model: nn.Module):
    """Raises `ValueError` naming tensors of a model that hold NaN or infinity.

    The check takes one pass over the weights and no memory. Weights that are offloaded to the disk are not checked.
    """
    weights = model.state_dict()
    # All checks are started before the first result is waited for.
    finite = {name: is_finite(tensor) for name, tensor in weights.items()}
    if broken := [name for name, value in finite.items() if not bool(value)]:
        raise ValueError(
            f"There are NaN or infinite values in {_first_of(broken)}, as {weights[broken[0]].dtype}; the checkpoint "
            "is damaged, its training went wrong, or the type is too small for it."
        )


def check_floats(stored: Iterable[str] | Mapping[str, torch.Tensor], unused: Collection[str]):
    """Raises `ValueError` naming tensors from which a model was loaded that are integers, or floats of 8 bits, which
    have a meaning only together with their scales.

    Args:
        stored: files of weights, or a state dict.
        unused: names of tensors that the model does not have.
    """
    if isinstance(stored, Mapping):
        types = {name: tensor.dtype for name, tensor in stored.items()}
    else:
        types = {name: dtype for file in stored for name, dtype in _stored_types(Path(file)).items()}
    if found := [name for name, dtype in types.items() if dtype not in FLOATS and name not in unused]:
        raise ValueError(
            f"The checkpoint holds {types[found[0]]} in {_first_of(found)}; save floats of 16 bits or more, or load it "
            "with the quantization_config that made them."
        )


def read_json(path: Path | str) -> dict:
    """The object in a JSON file. Raises `ValueError` if the file does not exist or holds anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        content = load_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON; is it complete? {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} in place of an object; fetch it again.")
    return content


def is_finite(tensor: torch.Tensor) -> bool | torch.Tensor:
    """Whether a tensor holds neither NaN nor infinity; `True` for dtypes other than floats, and on the meta device."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if tensor.dtype not in FLOATS or tensor.is_meta or not tensor.numel():
        return True
    # Both extremes are computed in one pass without memory, and a NaN makes them NaN.
    return torch.stack(tensor.aminmax()).isfinite().all()


def _stored_types(file: Path) -> dict[str, torch.dtype | str]:
    """The dtypes of the tensors in a file; for those not in `FLOATS` the file's name of the dtype."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            names = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}
        return {name: SAFETENSORS_FLOATS.get(dtype, dtype) for name, dtype in names.items()}
    tensors = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    return {name: tensor.dtype for name, tensor in tensors.items() if torch.is_tensor(tensor)}


def _first_of(names: Collection[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more tensors" if len(names) > MAX_NAMED else ""
    return ", ".join(sorted(names)[:MAX_NAMED]) + more
