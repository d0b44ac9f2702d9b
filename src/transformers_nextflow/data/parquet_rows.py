"""Rows of Parquet files, read row group by row group without a copy, from a disk or a store that fsspec knows."""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.extras import import_extra
from .stores import is_address, open_store


if TYPE_CHECKING:
    import pyarrow as pa

# How many footers of files are read at once.
READERS = 16


def parquet_files(source: str) -> list[str]:
    """The Parquet files of a source: a file, those of a folder, or of a pattern such as `s3://bucket/codes/*.parquet`.

    Empty for anything else.
    """
    if is_address(source):
        pattern = source if source.endswith(".parquet") else f"{source.rstrip('/')}/*.parquet"
        system, place = open_store(pattern)
        return sorted(system.unstrip_protocol(path) for path in system.glob(place))
    path = Path(source)
    if path.is_dir():
        return sorted(str(file) for file in path.glob("*.parquet") if file.name != "metadata.parquet")
    return sorted(glob.glob(source)) if source.endswith(".parquet") else []


class ParquetRows(Sequence):
    """Rows of Parquet files, read by number. At first only the footers of the files are read.

    Args:
        files: paths or addresses, in order.

    Raises:
        ValueError: for a file that is no Parquet file, and for one with a column twice.
    """

    def __init__(self, files: Sequence[str]):
        self.files = list(files)
        # For each row group the file, its number in the file, and its number of rows.
        self.groups: list[tuple[str, int, int]] = []
        with ThreadPoolExecutor(READERS) as pool:
            footers = list(pool.map(_footer, self.files))
        for file, (names, counts) in zip(self.files, footers):
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{file} has the column {repeated[0]!r} twice; keep one of them.")
            self.groups += [(file, group, count) for group, count in enumerate(counts)]
        self.names = footers[0][0]
        self.starts = [0, *accumulate(count for *_, count in self.groups)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        group = bisect_right(self.starts, index) - 1
        return _last_group(*self.groups[group][:2])[index - self.starts[group]]

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def read_group(self, group: int) -> TableRows:
        """The rows of a row group, in memory as they are stored."""
        return _read_group(*self.groups[group][:2])

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of all rows, row group by row group; the others are not read."""
        for file, group, _ in self.groups:
            with _open(file) as parquet:
                yield parquet.read_row_group(group, columns=list(columns))


class TableRows(Sequence):
    """Rows of an Arrow table; lists of codes become arrays without a copy."""

    def __init__(self, table: pa.Table):
        self.columns = dict(zip(table.column_names, table.columns))
        self.length = table.num_rows

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return {name: _value(column[index]) for name, column in self.columns.items()}


def _value(scalar: pa.Scalar) -> Any:
    pa = import_extra("pyarrow")
    kind = scalar.type
    if not scalar.is_valid or not pa.types.is_list(kind) or not pa.types.is_list(kind.value_type):
        return scalar.as_py()
    if not pa.types.is_integer(kind.value_type.value_type):
        return scalar.as_py()
    return [inner.values.to_numpy(zero_copy_only=False) if inner.is_valid else None for inner in scalar.values]


def _open(file: str):
    parquet, system = import_extra("pyarrow.parquet"), None
    place = file
    if is_address(file):
        arrow = import_extra("pyarrow.fs")
        system, place = open_store(file)
        system = arrow.PyFileSystem(arrow.FSSpecHandler(system))
    try:
        return parquet.ParquetFile(place, filesystem=system)
    except (import_extra("pyarrow").ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from error


def _footer(file: str) -> tuple[list[str], list[int]]:
    """The names of the columns, and the number of rows of each row group."""
    with _open(file) as parquet:
        footer = parquet.metadata
        counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        return parquet.schema_arrow.names, counts


def _read_group(file: str, group: int) -> TableRows:
    with _open(file) as parquet:
        return TableRows(parquet.read_row_group(group))


@lru_cache(maxsize=4)
def _last_group(file: str, group: int) -> TableRows:
    return _read_group(file, group)
