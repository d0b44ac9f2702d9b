"""What packing needs to know of a row, stored beside its codes: its length and how many positions are trained on.

`extract-codes` stores both for every view of a row (`views.py`), with a fingerprint of the processor that they hold
for; the grids of its images are stored with its codes. So packing reads neither texts nor codes, and tokenizes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from ..processing_nextflow import NextFlowProcessor
from .parquet_rows import ParquetRows
from .row_codes import FINGERPRINT, GRIDS


# For each view of a row the number of its positions, and of those that are trained on; null where it cannot be used.
SIZES = LENGTHS, TRAINED = "lengths", "trained_positions"
PROCESSOR = "processor_fingerprint"
# All columns that describe the size of a sample.
COLUMNS = (*SIZES, PROCESSOR, GRIDS, FINGERPRINT)
# Of the way in which rows are written as positions here; another one makes stored sizes those of another processor.
ENCODING_VERSION = 1
# Rows that are read at once.
BATCH = 10_000


def processor_fingerprint(processor: NextFlowProcessor) -> str:
    """16 hexadecimal digits that tell processors apart by which the same row has another size: of the tokenizer, the
    chat template, the scale schedules, and what a caption is asked for with.
    """
    words = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    words |= {"padding": None, "truncation": None}  # of the last call
    settings = [ENCODING_VERSION, processor.chat_template, processor.read_last_scale, processor.caption_request]
    settings += [processor.tokenizer.special_tokens_map, processor.image_token, words]
    settings += [getattr(processor.image_processor, name) for name in ("scales", "patch_size", "levels")]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def stored_size(row: dict, fingerprint: str) -> tuple[int, int] | None:
    """The length and the number of trained positions that a row has by a processor; `None` where it does not say."""
    if row.get(PROCESSOR) != fingerprint or row.get(LENGTHS) is None or row.get(TRAINED) is None:
        return None
    length, trained = row[LENGTHS][0], row[TRAINED][0]
    return None if length is None or trained is None else (int(length), int(trained))


def rows_of_sizes(rows: Any) -> Iterator[dict] | None:
    """Of every row the `COLUMNS` only; `None` for rows that have none, and that are not stored by columns."""
    if hasattr(rows, "rows_of_sizes"):
        return rows.rows_of_sizes()
    names = rows.names if isinstance(rows, ParquetRows) else getattr(rows, "column_names", None)
    if not names or not set(COLUMNS) <= set(names):
        return None
    return _columns(rows)


def _columns(rows: ParquetRows | Any) -> Iterator[dict]:
    if isinstance(rows, ParquetRows):
        tables = rows.tables(COLUMNS)
    else:  # of `datasets`
        tables = rows.select_columns(list(COLUMNS)).with_format("arrow").iter(BATCH)
    for table in tables:
        # Files of one source may be of different ages.
        names = set(table.column_names)
        columns = [table[name].to_pylist() if name in names else [None] * len(table) for name in COLUMNS]
        yield from (dict(zip(COLUMNS, values)) for values in zip(*columns))
