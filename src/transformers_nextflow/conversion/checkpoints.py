"""What all converters share: key tables, strict checks, reading and writing of sharded safetensors, model cards.

A state dict of meta tensors has names, shapes and dtypes without data; it describes what a file holds, or is to hold.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from itertools import zip_longest
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..configuration_nextflow import NextFlowVQConfig
from ..utils.checkpoint_checks import FLOATS, is_finite, read_json
from ..utils.model_cards import INHERITED, read_card_metadata, write_card
from ..utils.one_line_errors import note_on_interrupt
from ..utils.saved_adapters import FOLDER as ADAPTERS
from ..utils.short_repr import short_repr
from ..utils.weight_files import State, read_state_dict, safetensors_errors


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PLAN = "conversion.json"

# --- Keys ---------------------------------------------------------------------------------------------------------


class KeyMap:
    """A table of key patterns, which is used in both directions.

    >>> keys = KeyMap({"model.layers.*": "model.language_model.layers.*"}, dropped=["visual.*"])
    >>> keys.forward_key("model.layers.0.mlp.up_proj.weight")
    'model.language_model.layers.0.mlp.up_proj.weight'

    Args:
        table: source pattern → target pattern. Each `*` stands for any text, the same on both sides, in order; the
            shortest text that matches. The first row that matches a whole key is used.
        dropped: patterns of source keys without a key in the target.

    Raises:
        ValueError: for a row whose sides have different numbers of `*`.
    """

    def __init__(self, table: Mapping[str, str], dropped: Iterable[str] = ()):
        uneven = [f"{source} → {target}" for source, target in table.items() if source.count("*") != target.count("*")]
        if uneven:
            raise ValueError(f"Both sides of a row must hold as many *; these do not: {uneven}.")
        self._forward = [(_expression(source), target) for source, target in table.items()]
        self._inverse = [(_expression(target), source) for source, target in table.items()]
        self._dropped = [_expression(pattern) for pattern in dropped]

    def forward_key(self, key: str) -> str | None:
        """The target's key of a source key; `None` if it is dropped. Raises `ValueError` for an unknown key."""
        if any(expression.fullmatch(key) for expression in self._dropped):
            return None
        return _renamed(key, self._forward)

    def inverse_key(self, key: str) -> str:
        """The source's key of a target key. Raises `ValueError` for an unknown key."""
        return _renamed(key, self._inverse)

    def forward(self, state: Mapping[str, torch.Tensor]) -> State:
        """Source state → target state. Raises `ValueError` naming all keys that the table does not know."""
        return _renamed_state(state, self.forward_key)

    def inverse(self, state: Mapping[str, torch.Tensor]) -> State:
        """Target state → source state. Raises `ValueError` naming all keys that the table does not know."""
        return _renamed_state(state, self.inverse_key)


def _expression(pattern: str) -> re.Pattern:
    return re.compile("(.+?)".join(map(re.escape, pattern.split("*"))))


def _renamed(key: str, rows: list[tuple[re.Pattern, str]]) -> str:
    for expression, pattern in rows:
        if match := expression.fullmatch(key):
            return "".join(map("".join, zip_longest(pattern.split("*"), match.groups(), fillvalue="")))
    raise ValueError(f"The key table has no row for {key!r}; does the file come from another model?")


def _renamed_state(state: Mapping[str, torch.Tensor], rename: Callable[[str], str | None]) -> State:
    renamed, unknown = {}, []
    for key, tensor in state.items():
        try:
            name = rename(key)
        except ValueError:
            unknown.append(key)
            continue
        if name in renamed:
            raise ValueError(f"Two keys of the file map to {name!r}, {key!r} is one of them; remove one.")
        if name is not None:
            renamed[name] = tensor
    if unknown:
        raise ValueError(
            f"The key table has no rows for {_first_names(unknown)}; does the file come from another model?"
        )
    return renamed


# --- Checks -------------------------------------------------------------------------------------------------------


def check_state(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor | torch.Size]):
    """Raises `ValueError` naming keys that are missing, surplus, misshapen or integers, and tensors with NaN or inf.

    Args:
        state: tensors, meta tensors included.
        expected: name → shape, or tensors of that shape such as a model's `state_dict()` on the meta device.
    """
    shapes = {name: getattr(value, "shape", value) for name, value in expected.items()}
    missing, extra = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    ]
    integers = [
        name
        for name, value in expected.items()
        if name in state and getattr(value, "dtype", torch.long).is_floating_point > state[name].is_floating_point()
    ]
    faults = {"missing": missing, "not expected": extra, "of another shape": misshapen, "integers": integers}
    problems = [f"{kind}: {_first_names(names)}" for kind, names in faults.items() if names]
    if problems:
        raise ValueError(
            f"The tensors do not fit the model. {'; '.join(problems)}. Do file and config belong together?"
        )
    for name, tensor in state.items():
        check_finite(name, tensor)


def check_finite(name: str, tensor: torch.Tensor):
    """Raises `ValueError` if a tensor holds NaN or infinity, or has an unsupported dtype; values of meta tensors are
    not checked.
    """
    if tensor.is_floating_point() and tensor.dtype not in FLOATS:
        raise ValueError(f"Tensor {name!r} is of {tensor.dtype}; save it as one of {', '.join(map(str, FLOATS))}.")
    if not is_finite(tensor):
        raise ValueError(f"Tensor {name!r} holds NaN or infinite values; the file is damaged, fetch it again.")


def widest_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The dtype in which none of the tensors is rounded, for a model whose tensors have several dtypes."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _first_names(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- Reading ------------------------------------------------------------------------------------------------------


def read_config(folder: Path | str, *model_types: str) -> dict:
    """The `config.json` of a folder. Raises `ValueError` if there is none, or it has none of the model types."""
    config = read_json(Path(folder) / "config.json")
    if config.get("model_type") not in model_types:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r}, not {' or '.join(model_types)}."
        )
    return config


def read_vq_config(folder: Path | str) -> NextFlowVQConfig:
    """The config of a vision tokenizer's folder. Raises `ValueError` if it holds none."""
    read_config(folder, NextFlowVQConfig.model_type)
    with config_errors(folder):
        return NextFlowVQConfig.from_pretrained(folder)


@contextmanager
def config_errors(folder: Path | str) -> Iterator[None]:
    """Turns errors of transformers about the values in a folder's `config.json` into a `ValueError` that names it."""
    try:
        yield
    except (StrictDataclassError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{Path(folder) / 'config.json'} does not describe its model; correct it. {reason}") from error


class ShardedCheckpoint(Mapping):
    """The tensors of a folder with `model.safetensors`, or with shards and their index; each is read on access.

    Raises:
        ValueError: if files are missing or truncated, or the index and the files disagree.
    """

    single, index = SINGLE, INDEX

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if (self.folder / self.index).is_file():
            self.files = self._weight_map()
        elif (self.folder / self.single).is_file():
            self.files = dict.fromkeys(self._layout_of(self.single), self.single)
        else:
            raise ValueError(f"{self.folder} holds neither {self.single} nor {self.index}; is it a folder of a model?")
        self.layout = self._checked_layout()

    def _weight_map(self) -> dict[str, str]:
        files = read_json(self.folder / self.index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError(
                f"{self.folder / self.index} is not an index of shards: it has no weight_map from names to files."
            )
        return files

    def _layout_of(self, name: str) -> State:
        return read_layout(self.folder / name)

    def _checked_layout(self) -> State:
        names = sorted(set(self.files.values()))
        absent = [name for name in names if Path(name).name != name or not (self.folder / name).is_file()]
        if absent:
            raise ValueError(
                f"The index of {self.folder} names {_first_names(absent)}, but there is no such file; fetch it."
            )
        found: State = {}
        for name in names:
            layout = self._layout_of(name)
            wrong = sorted(layout.keys() ^ {key for key, file in self.files.items() if file == name})
            if wrong:
                raise ValueError(
                    f"The index of {self.folder} and {name} disagree on {_first_names(wrong)}; fetch both again."
                )
            found |= layout
        return {key: found[key] for key in self.files}

    def __getitem__(self, key: str) -> torch.Tensor:
        """Raises `ValueError` for NaN and infinite values."""
        path = self.folder / self.files[key]
        with safetensors_errors(path), safe_open(path, framework="pt") as file:
            # Copied, since the mapped file would count as memory as long as it is open.
            tensor = file.get_tensor(key).clone()
        check_finite(key, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class PickledCheckpoint(ShardedCheckpoint):
    """The same for a folder with `pytorch_model.bin`, or with such shards and their index; one file is in memory."""

    single, index = "pytorch_model.bin", "pytorch_model.bin.index.json"

    def __init__(self, folder: Path | str):
        self._open: tuple[str, State] = ("", {})
        super().__init__(folder)

    def _load(self, name: str) -> State:
        if self._open[0] != name:
            self._open = ("", {})
            state = read_state_dict(self.folder / name)
            if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
                raise ValueError(f"{self.folder / name} holds more than tensors; is it a shard of a model?")
            self._open = (name, state)
        return self._open[1]

    def _layout_of(self, name: str) -> State:
        return {key: tensor.to("meta") for key, tensor in self._load(name).items()}

    def __getitem__(self, key: str) -> torch.Tensor:
        """Raises `ValueError` for NaN and infinite values."""
        tensor = self._load(self.files[key])[key]
        check_finite(key, tensor)
        return tensor


def open_checkpoint(folder: Path | str) -> ShardedCheckpoint:
    """The tensors of a folder, safetensors or pickles; errors are those of [`ShardedCheckpoint`]."""
    names = {path.name for path in Path(folder).glob("*")}
    pickled = names & {PickledCheckpoint.single, PickledCheckpoint.index}
    return PickledCheckpoint(folder) if pickled and not names & {SINGLE, INDEX} else ShardedCheckpoint(folder)


def open_exported(folder: Path | str) -> ShardedCheckpoint:
    """The tensors of a folder of ours that is exported. Raises `ValueError` if there are adapters beside them, too."""
    if (Path(folder) / ADAPTERS).is_dir():
        raise ValueError(
            f"{folder} holds adapters beside its weights, which an export would leave out. Load it as a pipeline, call "
            "fuse_lora and unload_lora_weights, and export what is saved then."
        )
    return open_checkpoint(folder)


def read_layout(path: Path | str, allowed: Iterable[type] = ()) -> State:
    """Names, shapes and dtypes of one file as meta tensors. Arguments and errors are those of `read_state_dict`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}, or it is a pipe or a device.")
    if path.suffix != ".safetensors":
        return {key: tensor.to("meta") for key, tensor in _tensors(read_state_dict(path, allowed))}
    with safetensors_errors(path), safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        # An empty slice gives the dtype without reading data; scalars have no slices.
        samples = {key: part[:0] if part.get_shape() else part[...] for key, part in slices.items()}
        return {key: samples[key].new_empty(part.get_shape(), device="meta") for key, part in slices.items()}


def _tensors(value: object, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    # Training checkpoints hold models as dicts inside of a dict, beside steps and settings.
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _tensors(part, f"{prefix}.{name}" if prefix else str(name))


# --- Writing ------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(target: Path | str, plan: dict | None = None) -> Iterator[Path]:
    """A folder to write into, `TARGET.partial`, which is renamed to `target` when the block ends without an error.

    A `ValueError` in the block removes it. It stays after a kill or on a full disk; a later run with the same `plan`
    continues in it, and a run without a plan starts again.

    Args:
        target: the final folder.
        plan: what the files depend on, as JSON: sources, settings, layout.

    Raises:
        ValueError: if `target` exists already, or its partial folder was begun with another plan or holds files of
            another origin.
    """
    target = Path(target)
    if target.exists():
        raise ValueError(f"{target} already exists; remove it or choose another folder.")
    partial = target.with_name(target.name + ".partial")
    described, unfinished = json.dumps(plan), partial / f"{PLAN}.unfinished"
    if (partial / PLAN).is_file():
        if (partial / PLAN).read_text() != described:
            raise ValueError(
                f"{partial} was started from other files or with other settings; remove it to start again."
            )
        if plan is None:
            shutil.rmtree(partial)
    elif partial.exists() and any(path != unfinished for path in partial.iterdir()):
        raise ValueError(
            f"{partial} exists, but not from a conversion; move it away, since files are written there first."
        )
    partial.mkdir(parents=True, exist_ok=True)
    for left in partial.glob(".tmp*"):  # files that safetensors was writing when a run was killed
        left.unlink()
    unfinished.write_text(described)
    unfinished.replace(partial / PLAN)
    then = "starts again" if plan is None else "continues"
    kept = f"What is written is kept in {partial}, where the same command {then}."
    try:
        with note_on_interrupt(lambda: kept):
            yield partial
    except ValueError:
        shutil.rmtree(partial)
        raise
    partial.replace(target)
    (target / PLAN).unlink()


def write_shards(
    folder: Path,
    layout: Mapping[str, torch.Tensor],
    make: Callable[[str], torch.Tensor],
    max_shard_size: str = "2GB",
):
    """Write tensors as safetensors, one shard in memory at a time; shards that exist already are kept.

    Args:
        folder: the folder from `new_folder` for the shards, and for their index if there are several.
        layout: meta tensors of all tensors to write.
        make: name → tensor; called once for each name, shard by shard.
        max_shard_size: bytes of a shard, such as "2GB"; a larger tensor has a shard of its own.

    Raises:
        ValueError: if a tensor differs from its layout, or holds NaN or infinity; for an invalid size.
        OSError: if a file cannot be written.
    """
    if not re.fullmatch("[1-9][0-9]*[KMGT]B", str(max_shard_size)):
        raise ValueError(f"max_shard_size must be a size such as '2GB' or '500MB', got {max_shard_size!r}.")
    shards = split_torch_state_dict_into_shards(dict(layout), max_shard_size=max_shard_size)
    with tqdm(total=len(layout), desc=f"writing {folder.stem}", unit="tensor") as progress:
        for name, keys in shards.filename_to_tensors.items():
            if (folder / name).exists():
                progress.update(len(keys))
                continue
            state = {}
            for key in keys:
                state[key] = make(key).contiguous()
                progress.update()
            check_state(state, {key: layout[key] for key in keys})
            # Under a temporary name until it is complete.
            try:
                save_file(state, folder / f"{name}.unfinished", metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(
                    f"{folder / name} could not be written: {error}. Make room and run it again; shards that are "
                    "finished are kept."
                ) from error
            (folder / f"{name}.unfinished").replace(folder / name)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def check_written(folder: Path, layout: Mapping[str, torch.Tensor], make: Callable[[str], torch.Tensor]):
    """Read all back, one tensor at a time. Raises `ValueError` for a tensor that differs from that of `make`."""
    written = ShardedCheckpoint(folder)
    check_state(written.layout, layout)
    for key in tqdm(layout, desc=f"checking {folder.stem}", unit="tensor"):
        expected, found = make(key), written[key]
        if expected.dtype != found.dtype or not torch.equal(expected, found):
            raise ValueError(f"{key} was not written as it was converted; check the disk and convert again.")


def fingerprint(folder: Path | str) -> list:
    """Names, sizes and times of the files in a folder, for the plan of `new_folder`."""
    paths = [path for path in sorted(Path(folder).iterdir()) if path.is_file()]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def check_repository(name: str | None):
    """Raises `ValueError` for what names no repository of the Hub; it would be written into a card's header."""
    if name is not None:
        try:
            validate_repo_id(name)
        except ValueError as error:
            raise ValueError(
                f"base_model {short_repr(name)} is not the name of a repository of the Hub: {error}"
            ) from error


def write_model_card(
    folder: Path,
    source: Path | str,
    title: str,
    text: str,
    base_model: str | None = None,
    pipeline_tag: str = "any-to-any",
    library_name: str = "transformers",
    tags: Iterable[str] = (),
    prompts: Iterable[str] = (),
):
    """Write `README.md`: the source of a converted model, its licence, and prompts for the Hub's widget.

    Args:
        folder: the folder of the card.
        source: folder, or file in a folder, whose `README.md` states the licence; without one it is "unknown".
        title, text: heading and body, Markdown.
        base_model: repository of the source on the Hub; default: that of a folder of the Hub's cache, if it is one.
        tags: beyond `nextflow`.
        prompts: texts of the widget; without any there is none.
    """
    check_repository(base_model)
    source = Path(source).absolute()  # and not resolved: files of the Hub's cache are links into another folder
    folder_of_source = source.parent if source.is_file() else source
    inherited = read_card_metadata(folder_of_source)
    data = {"license": "unknown"} | {name: inherited[name] for name in INHERITED if name in inherited}
    cached = [part.removeprefix("models--").replace("--", "/") for part in source.parts if part.startswith("models--")]
    write_card(
        folder,
        title,
        [text],
        **data,
        base_model=base_model or (cached[-1] if cached else None),
        pipeline_tag=pipeline_tag,
        library_name=library_name,
        tags=["nextflow", *tags],
        widget=[{"text": prompt} for prompt in prompts] or None,
    )
