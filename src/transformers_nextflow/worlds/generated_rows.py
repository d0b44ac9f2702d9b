"""Writes the training data that a world's script generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
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
    output.parent.mkdir(parents=True, exist_ok=True)
    # A cache of its own: in an older one `datasets` would take rows for these if only the content of a tokenizer's
    # folder, of the drawings, or of the code is another one.
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as cache:
        dataset = import_extra("datasets").Dataset.from_generator(
            generate,
            gen_kwargs=arguments | {"shards": shards},
            features=features,
            num_proc=processes,
            cache_dir=cache,
        )
        dataset.save_to_disk(output)
