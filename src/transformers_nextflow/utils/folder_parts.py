"""Where a model and its processor lie: a model's folder holds both, a pipeline's holds each in a subfolder of its name,
and an adapter's may leave the processor to its base model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import cached_file

from .checkpoint_checks import read_json
from .saved_adapters import FILES as ADAPTER_FILES
from .saved_adapters import HUB_OPTIONS
from .short_repr import short_path


# The file by which each part is known; a vision tokenizer is a model, too.
FILES = {"model": "config.json", "processor": "processor_config.json"}
PIPELINE_INDEX = "model_index.json"


class Place(NamedTuple):
    """A folder or a repository of the Hub, and the options with which `from_pretrained` finds a part there."""

    folder: str | os.PathLike
    options: dict[str, Any]


def find_part(part: str, folder: str | os.PathLike, **hub_options) -> Place | None:
    """The place of a part in a folder or a repository; `None` if it has no such part.

    Args:
        part: "model" or "processor".
        hub_options: those of `HUB_OPTIONS`.
    """
    place = _own_part(part, folder, hub_options)
    if place is None and part == "processor" and (base := _base_of_adapter(folder, hub_options)) is not None:
        place = _own_part(part, base.folder, base.options)
    return place


def place_of(part: str, folder: str | os.PathLike, **hub_options) -> Place:
    """As `find_part`; if there is no such part, the folder itself, which errors of `from_pretrained` then name."""
    return find_part(part, folder, **hub_options) or Place(folder, hub_options)


def local_part(part: str, folder: str | os.PathLike) -> Path:
    """As `place_of`, where only folders of this machine are read."""
    return Path(place_of(part, folder).folder if os.path.isdir(folder) else folder)


def load_part(kind, part: str, folder: str | os.PathLike, **kwargs):
    """`kind.from_pretrained` for a part of a folder or a repository; see `load_model` for adapters."""
    hub_options, others = _split(kwargs)
    place = place_of(part, folder, **hub_options)
    return kind.from_pretrained(place.folder, **place.options, **others)


def load_model(kind, folder: str | os.PathLike, **kwargs):
    """`kind.from_pretrained` for the model of a model's or a pipeline's folder or repository; for an adapter's, the
    base model with the adapter in it.
    """
    hub_options, others = _split(kwargs)
    base = _base_of_adapter(folder, hub_options)
    if base is None:
        return load_part(kind, "model", folder, **kwargs)
    if holds(base.folder, FILES["model"], **base.options):
        return kind.from_pretrained(folder, **kwargs)
    # transformers looks for the base model of an adapter only in the folder or repository itself.
    model = load_part(kind, "model", base.folder, **base.options, **others)
    model.load_adapter(str(folder), adapter_kwargs=hub_options)
    return model


@contextmanager
def pipeline_errors(folder: str | os.PathLike | None, kwargs: dict[str, Any]) -> Iterator[None]:
    """Around a model's own `from_pretrained`, which reads only the folder that it is given: if that is a pipeline's,
    the error says so.
    """
    try:
        yield
    except OSError as error:
        hub_options, others = _split(kwargs)
        if folder is None or others.get("subfolder"):
            raise
        if place_of("model", folder, **hub_options) != Place(folder, hub_options):
            raise ValueError(
                f"{short_path(folder)} holds a pipeline; load its model with subfolder='model', or all of it by "
                "NextFlowPipeline.from_pretrained."
            ) from error
        raise


def holds(folder: str | os.PathLike, name: str, **hub_options) -> bool:
    """Whether a folder or repository has a file."""
    return cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **hub_options) is not None


def pipeline_around(folder: str | os.PathLike) -> Path | None:
    """The folder of this machine with the pipeline of which a folder is a part."""
    path = Path(os.path.abspath(folder))
    return path.parent if path.name in FILES and (path.parent / PIPELINE_INDEX).is_file() else None


def _own_part(part: str, folder: str | os.PathLike, hub_options: dict[str, Any]) -> Place | None:
    if holds(folder, FILES[part], **hub_options):
        return Place(folder, hub_options)
    if os.path.isdir(folder):
        # As a path, which transformers and PEFT find again where it is stored as the base model of an adapter.
        inside = [Path(around, part) for around in (folder, pipeline_around(folder)) if around is not None]
        found = [path for path in inside if (path / FILES[part]).is_file()]
        return Place(str(found[0]), hub_options) if found else None
    if holds(folder, f"{part}/{FILES[part]}", **hub_options):
        return Place(folder, hub_options | {"subfolder": part})
    return None


def _base_of_adapter(folder: str | os.PathLike, hub_options: dict[str, Any]) -> Place | None:
    """Where the base model of an adapter is; `None` for the folder of a model or a pipeline."""
    if holds(folder, FILES["model"], **hub_options):  # which may hold an adapter beside its weights
        return None
    _, config = ADAPTER_FILES
    file = cached_file(folder, config, _raise_exceptions_for_missing_entries=False, **hub_options)
    base = None if file is None else read_json(file).get("base_model_name_or_path")
    # A revision is that of the adapter.
    own = {name: value for name, value in hub_options.items() if name != "revision"}
    return Place(base, own) if isinstance(base, str) and base else None


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the Hub, and the others."""
    hub_options = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
    return hub_options, {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
