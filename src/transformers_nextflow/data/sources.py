"""Opens sources of rows: files of rows, folders of captioned images, tables, tars, data sets of the Hub."""

from __future__ import annotations

import csv
import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..utils.extras import import_extra
from ..utils.short_repr import short_path, short_repr
from ..utils.unique_names import load_json
from .columns import CLASS, Columns, ConversationRows
from .parquet_rows import ParquetRows
from .row_errors import BadRowError
from .stores import METADATA, StoredImages, is_address, list_store_files, without_file_scheme


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What `datasets` says of sources without rows, and what it means.
CLEARER_ERRORS = {
    "corresponds to no data": "it holds no images.",
    "Must pass at least one table": "it holds no files of rows.",
}
KINDS = "a .jsonl, .parquet or .tar file, a folder of those, of images or of save_to_disk, or a data set of the Hub"


def open_rows(
    source: str | os.PathLike,
    columns: Columns | None = None,
    streaming: bool = False,
    needs_texts: bool = True,
) -> tuple[Sequence[dict] | IterableDataset, Path]:
    """The rows of a source (docs/data.md), and the folder to which paths of their images are relative.

    Rows of `messages` are returned unchanged. Rows of an image and a caption, and those of an image, an instruction and
    an edited image, become rows of messages.

    Args:
        source: a `.jsonl` file with images beside it; `.parquet` files; a folder of images with `metadata.jsonl`,
            `.csv` or `.parquet`; WebDataset `.tar` files; a folder that `Dataset.save_to_disk` wrote; or the name of a
            data set of the Hub, of which the split "train" is read. Or an address in a store that fsspec knows, of
            `.parquet` or `.tar` files, or of a folder of images with `metadata.jsonl`.
        columns: the names of columns; missing names are found.
        streaming: return tables as a stream of `datasets`, which is read during iteration. Files of rows, and what
            `save_to_disk` wrote, are always read on access, by number.
        needs_texts: whether images without captions are refused; else their prompts are empty.

    Raises:
        ValueError: for any other source, and for columns that do not exist.
    """
    columns, source = columns or Columns(), without_file_scheme(source)
    if is_address(source):
        return _stored_rows(str(source), columns, streaming, needs_texts), Path(".")
    path = Path(source)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return _file_of_rows(JsonLines(path), columns, needs_texts), path.parent
    kind, files = _kind_of(source, path)
    datasets = import_extra("datasets")
    table = _load(datasets, kind, files, streaming, short_path(path))
    return _table_of_rows(table, columns, needs_texts, short_path(path)), path if path.exists() else Path(".")


def _stored_rows(source: str, columns: Columns, streaming: bool, needs_texts: bool):
    """Rows in a store: Parquet files are read row group by row group, images one by one; `datasets` downloads tars."""
    kind, files = list_store_files(source)
    if kind != "webdataset":
        rows = ParquetRows(files) if kind == "parquet" else StoredImages(source)
        return _file_of_rows(rows, columns, needs_texts)
    datasets = import_extra("datasets")
    table = _load(datasets, kind, files, streaming, short_path(source))
    return _table_of_rows(table, columns, needs_texts, short_path(source))


def _file_of_rows(rows: Sequence[dict], columns: Columns, needs_texts: bool) -> Sequence[dict]:
    try:
        first = rows[0] if len(rows) else {}
    except BadRowError:
        first = {}
    names = list(first) if isinstance(first, dict) else []  # the error follows, with the number, where the row is used
    if not columns.are_named and ("messages" in names or not names):
        return rows
    try:
        found = columns.found_among(names)
    except ValueError:
        if columns.are_named:
            raise
        return rows  # each row is refused later, since it has no messages
    _check_texts(found, needs_texts, names)
    return ConversationRows(rows, found)


def _kind_of(source: str | os.PathLike, path: Path) -> tuple[str, Any]:
    """The reader of `datasets` for a source, and its argument. Raises `ValueError` if there is none."""
    if not os.path.exists(path):
        if not HUB_NAME.fullmatch(str(source)):
            raise ValueError(
                f"There is no file or folder {short_path(path)}, and it is not the name of a data set of the Hub."
            )
        return "hub", str(source)
    is_folder = path.is_dir()
    if is_folder and (path / "dataset_info.json").is_file():
        return "saved", str(path)
    for kind, suffix in (("parquet", ".parquet"), ("webdataset", ".tar")):
        found = [path] if path.suffix == suffix else sorted(path.glob(f"*{suffix}")) if is_folder else []
        if files := [str(file) for file in found if file.name != "metadata.parquet"]:
            return kind, files
    lines = [file.name for file in sorted(path.glob("*.jsonl"))] if is_folder else []
    if lines and not any(path.glob("metadata.*")):
        raise ValueError(
            f"{short_path(path)} holds {lines[0]}; name that file, or call it {METADATA} beside its images."
        )
    if not is_folder or not any(path.iterdir()):
        raise ValueError(f"{short_path(path)} is not {KINDS}.")
    folder = path / "train" if (path / "train").is_dir() else path
    for file in folder.rglob("metadata.csv"):
        _check_header(file)
    # All files are named, since `datasets` would take some for those of a test set by their names.
    return "imagefolder", glob.escape(str(folder.absolute())) + "/**"


def _check_header(file: Path):
    """Raises `ValueError` for a name that the first line of a CSV holds twice; its reader gives one another name."""
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
        names = next(csv.reader(lines), [])
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{short_path(file)} has the column {short_repr(repeated[0])} twice; keep one of them.")


def _load(datasets: ModuleType, kind: str, files: Any, streaming: bool, name: str) -> Dataset | IterableDataset:
    """What `datasets` makes of files. Raises `ValueError` with what it, pyarrow and the Hub, each its own way, say."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs with a traceback what it raises
    try:
        return _loaded(datasets, kind, files, streaming)
    except Exception as error:
        while type(error).__name__ == "DatasetGenerationError" and isinstance(error.__cause__, Exception):
            error = error.__cause__
        reason = next((ours for theirs, ours in CLEARER_ERRORS.items() if theirs in str(error)), str(error))
        reason = f"it lacks {error}" if isinstance(error, KeyError) else reason
        raise ValueError(f"{name} cannot be read as rows: {reason}") from error
    finally:
        datasets.logging.set_verbosity(level)


def _loaded(datasets: ModuleType, kind: str, files: Any, streaming: bool) -> Dataset | IterableDataset:
    if kind == "webdataset":
        # Its own reader of JSON keeps the last of repeated names, and does not tell.
        decoders = import_extra("datasets.packaged_modules.webdataset.webdataset").WebDataset.DECODERS
        decoders.update(json=load_json, jsn=load_json)
    if kind == "hub":
        return datasets.load_dataset(files, split="train", streaming=streaming)
    if kind == "saved":
        return datasets.load_from_disk(files)
    if kind == "parquet" and not streaming:
        return datasets.Dataset.from_parquet(files)
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=streaming)


def _table_of_rows(table: Dataset | IterableDataset, columns: Columns, needs_texts: bool, name: str):
    datasets = import_extra("datasets")
    features = table.features or {}
    names = list(features or table.column_names or next(iter(table), {}))
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if isinstance(getattr(features.get("images"), "feature", None), datasets.Image):
        # Not decoded by `datasets`, so that errors for broken images name row and field.
        table = table.cast_column("images", datasets.List(datasets.Image(decode=False)))
    for column in images:
        table = table.cast_column(column, datasets.Image(decode=False))
    if "messages" in names and not columns.are_named:
        return table
    try:
        found = columns.found_among(names, images)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    label = features.get(CLASS if found.caption is None else found.caption)
    classes = label.names if isinstance(label, datasets.ClassLabel) else None
    if found.caption is None and classes is not None:
        found = Columns(found.image, CLASS, found.edited_image)
    _check_texts(found, needs_texts, names)
    if isinstance(table, datasets.IterableDataset):
        return table.map(partial(_conversation, found, classes), with_indices=True, remove_columns=names)
    return ConversationRows(table, found, classes)


def _conversation(columns: Columns, classes: Sequence[str] | None, row: dict, index: int) -> dict:
    try:
        return columns.conversation(row, classes)
    except BadRowError as error:
        raise error.of_row(index) from error


def _check_texts(columns: Columns, needed: bool, names: Sequence[str]):
    if needed and columns.caption is None:
        raise ValueError(
            f"No column is known to hold captions; there are {', '.join(sorted(names))}. Name it by --caption-column; "
            "beside a folder's images lies metadata.jsonl, with file_name and text in each line."
        )


class JsonLines:
    """Rows of a JSON Lines file, read by number; empty lines do not count."""

    def __init__(self, path: Path):
        self.path, self.offsets = path, []
        with open(path, "rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    self.offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Any:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            try:
                return load_json(file.readline())
            except (ValueError, RecursionError) as error:
                raise BadRowError("row", f"is not valid JSON: {error}") from error

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))
