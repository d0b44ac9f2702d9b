"""Measure how training data of ten million rows start: the time to the first batch, who reads which rows, and memory.

    OMP_NUM_THREADS=1 python benchmarks/data_start.py

The script writes 7.5 million rows with the codes of an image and 2.5 million rows of text as `extract-codes` does, in
Parquet files with row groups of a thousand rows. Files with the same rows are hard links, so they take the space of
only a few. It then measures four things:

1. A new process opens a mixture of both as the trainer does for one of 64 processes, and packs it: seconds until the
   mixture is open and until the first batch, with and without the imports.
2. 64 readers are started one after another, not at once. The row groups that each opens for its first rows are counted;
   no two readers may open the same.
3. One reader continues for a thousand steps: its memory after the first hundred steps and at the end.
4. Some thousand rows are packed as a data set with a length is, with the stored sizes and without: seconds until it is
   packed.

Writes `results/data_start.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from backbone import RESULTS


TARGET_SECONDS = 30
SHARES = {"images": 0.75, "text": 0.25}
ROWS_PER_FILE, GROUP = 100_000, 1_000
CODES, GRID = 30, [4, 4]
STEPS, SETTLED = 1000, 100
ROWS_BY_NUMBER = 4000


def write_rows(folder: Path, files: int, with_codes: bool, rows_per_file: int):
    """Writes files of the same rows under many names."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    from transformers_nextflow.data.code_extraction import _write_parquet
    from transformers_nextflow.data.stored_sizes import PROCESSOR, processor_fingerprint
    from transformers_nextflow.data.views import size_fields

    folder.mkdir()
    chance = np.random.default_rng(0)
    words = ["red", "blue", "circle", "star", "two"]
    processor = tiny().tiny_processor()

    def row(number: int) -> dict:
        said = " ".join(words[i] for i in chance.integers(len(words), size=8))
        answer = {"type": "image"} if with_codes else {"type": "text", "text": said}
        asked = [{"type": "text", "text": said}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": [answer]}]
        codes = [chance.integers(32, size=CODES).tolist()] if with_codes else None
        grids = [GRID] if with_codes else None
        held = {"messages": messages, "image_tokens": codes, "image_labels": codes, "image_grids": grids}
        return held | size_fields(held, processor) | {PROCESSOR: processor_fingerprint(processor)}

    first = folder / "codes-000000.parquet"
    _write_parquet([row(number) for number in range(min(rows_per_file, GROUP))], first, 32)
    group = parquet.read_table(first)
    repeated = pa.concat_tables([group] * max(1, rows_per_file // GROUP))
    parquet.write_table(repeated, first, row_group_size=GROUP)
    for number in range(1, files):
        os.link(first, folder / f"codes-{number:06d}.parquet")


def open_mixture(folder: Path, share: int, shares: int):
    from transformers_nextflow.data import Columns
    from transformers_nextflow.data.mixture import Mixture, open_source

    sources = [(open_source(name, folder, Columns()), weight) for name, weight in SHARES.items()]
    mixture = Mixture(sources)
    mixture.take_share(share, shares, 0)
    return mixture


def tiny():
    """Imports the tiny models of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    return tiny


def packs_of(mixture):
    """Makes batches as the trainer does, with the tiny model of the tests."""
    from transformers_nextflow.trainers import CostModel, NextFlowCollator, PackedStream

    collator, model = NextFlowCollator(tiny().tiny_processor()), CostModel.from_config(tiny().tiny_config())
    packs = PackedStream(mixture, lambda row: model.cost(collator.size(row)), 800)
    return (collator([pack]) for pack in packs)


def start(folder: Path, shares: int) -> dict:
    """Returns the seconds of the imports, until the mixture is open, and until the first batch, in a new process."""
    begun = time.perf_counter()
    import transformers_nextflow.trainers  # noqa: F401

    imported = time.perf_counter()
    mixture = open_mixture(folder, 0, shares)
    opened = time.perf_counter()
    next(packs_of(mixture))
    first = time.perf_counter()
    return {
        "rows": sum(source.size for source in mixture.sources),
        "seconds_of_imports": round(imported - begun, 2),
        "seconds_until_open": round(opened - imported, 2),
        "seconds_until_first_batch": round(first - imported, 2),
    }


def count_groups(folder: Path, shares: int, rows: int) -> dict:
    """Counts which row groups each reader opens for its first rows."""
    from transformers_nextflow.data.parquet_rows import ParquetRows

    read_group, opened = ParquetRows.read_group, []
    mixture = open_mixture(folder, 0, shares)

    def counted(self, group: int):
        opened.append((reader, *self.groups[group][:2]))
        return read_group(self, group)

    ParquetRows.read_group = counted
    try:
        for reader in range(shares):
            mixture.take_share(reader, shares, 0)
            for _ in islice(mixture, rows):
                pass
    finally:
        ParquetRows.read_group = read_group
    groups = {group for _, *group in map(tuple, opened) for group in [tuple(group)]}
    return {
        "readers": shares,
        "groups_opened": len(set(opened)),
        "groups_opened_by_two": len(set(opened)) - len(groups),
    }


def run_on(folder: Path, shares: int, steps: int) -> dict:
    """Measures memory and speed over many steps of one reader."""
    batches = packs_of(open_mixture(folder, 0, shares))
    memory, begun = {}, time.perf_counter()
    for step in range(1, steps + 1):
        next(batches)
        if step in (min(SETTLED, steps), steps):
            memory[step] = current_memory()
    first, last = memory.values() if len(memory) == 2 else 2 * list(memory.values())
    return {
        "steps": steps,
        "mib_settled": round(first),
        "mib_at_the_end": round(last),
        "mib_gained": round(last - first, 1),
        "batches_per_second": round(steps / (time.perf_counter() - begun), 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def current_memory() -> float:
    """Returns the memory of the process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def pack_by_number(folder: Path, _) -> dict:
    """Times packing by row number as the trainer does, with stored sizes and with those of another processor."""
    from transformers_nextflow.data import open_rows
    from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainingArguments
    from transformers_nextflow.trainers.nextflow_trainer import packed
    from transformers_nextflow.trainers.recipe_data import StageRows

    rows, _ = open_rows(folder / "by_number")
    config, processors = tiny().tiny_config(), [tiny().tiny_processor() for _ in range(2)]
    processors[1].chat_template += "{# another one #}"
    options = {"packing": "compute", "packing_budget": 800, "per_device_train_batch_size": 1, "use_cpu": True}
    args = NextFlowTrainingArguments(output_dir=str(folder / "out"), **options)
    found = []
    for processor in processors:
        stage, begun = StageRows(rows, processor, caption_share=0.1, empty_share=0.1), time.perf_counter()
        found.append((packed(stage, NextFlowCollator(processor), config, args), time.perf_counter() - begun))
    (stored, seconds), (read, seconds_without) = found
    assert stored.packs == read.packs
    return {
        "rows": len(stored.rows),
        "packs": len(stored),
        "seconds_with_stored_sizes": round(seconds, 2),
        "seconds_without": round(seconds_without, 2),
    }


PARTS = {"start": start, "groups": count_groups, "steps": run_on, "by_number": pack_by_number}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rows_per_file", type=int, default=ROWS_PER_FILE)
    parser.add_argument("--readers", type=int, default=64)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--part", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    more = {"start": (), "groups": (200,), "steps": (arguments.steps,), "by_number": ()}
    if arguments.part:
        name, folder = arguments.part
        print(json.dumps(PARTS[name](Path(folder), arguments.readers, *more[name])))
        return
    values: dict = {"target_seconds": TARGET_SECONDS}
    with tempfile.TemporaryDirectory() as folder:
        for name, share in SHARES.items():
            files = round(arguments.rows * share / arguments.rows_per_file)
            write_rows(Path(folder) / name, files, name == "images", arguments.rows_per_file)
        write_rows(Path(folder) / "by_number", 1, True, ROWS_BY_NUMBER)
        for name in PARTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--part", name, folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            values[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, values[name])
    from transformers_nextflow.evaluation.results import write_result

    print("written:", write_result(Path(arguments.results) / "data_start.json", values))


if __name__ == "__main__":
    main()
