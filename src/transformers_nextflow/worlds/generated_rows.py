"""Writes the training data that a world's script generates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.extras import import_extra


if TYPE_CHECKING:
    from datasets import Features


def write_generated_rows(
    generate: Callable, output: Path, features: Features, processes: int, shards: list[int], **arguments
):
    """Write the rows of `generate(shards=…, **arguments)` to a folder, as `Dataset.save_to_disk` does.

    Args:
        processes: number of processes, among which the shards are divided.
    """
    cache = output.with_suffix(".cache")
    # `datasets` would take rows that it finds there for these if only the content of a tokenizer's folder, of the
    # drawings, or of the code is another one.
    shutil.rmtree(cache, ignore_errors=True)
    dataset = import_extra("datasets").Dataset.from_generator(
        generate,
        gen_kwargs=arguments | {"shards": shards},
        features=features,
        num_proc=processes,
        cache_dir=str(cache),
    )
    dataset.save_to_disk(output)
    shutil.rmtree(cache)
