"""Extraction of the codes of all images before training (paper, section 3.3: index sequences are extracted offline).

The output is a folder of Parquet shards, which `datasets` reads and streams, each with a note of its rows and its hash
beside it. Shards are written atomically, and finished shards stay: after a kill or on a full disk the same command
makes only the missing shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..image_processing_nextflow import NextFlowImageProcessor
from ..utils.devices import on_device
from ..utils.extras import import_extra
from ..utils.one_line_errors import note_on_interrupt
from ..utils.typed_values import read_typed
from ..utils.unique_names import load_json
from ..vision_tokenizer.fingerprint import tokenizer_fingerprint
from ..vision_tokenizer.multiscale_quantizer import SelfCorrection
from .columns import Columns
from .row_codes import CLEAN_TOKENS, FINGERPRINT, GRIDS, LABELS, TOKENS, code_fields, encoded_images
from .row_encoding import read_pixels
from .rows import Sample, read_row
from .sources import open_rows
from .stored_sizes import PROCESSOR, SIZES, processor_fingerprint
from .stores import Folder, LocalFolder, is_address, open_folder, without_file_scheme
from .validation import check_on_bad_image, usable_rows
from .views import size_fields
from .vision_tokenizer import load_processor, load_vision_tokenizer


SETTINGS = "extraction.json"
# 1 had codes sampled for self-correction for images of all turns, and no clean ones; 2 had no sizes.
ROW_FORMAT = 3
# Batches of images that are held at once; their sizes are many.
MAX_WAITING = 8
# The largest seed, since seeds of shards, which are computed from it, have 64 bits.
MAX_SEED = 2**32
# The largest number of tasks that Ray manages at once.
MAX_BLOCKS = 10_000


@dataclass(frozen=True)
class Extraction:
    """The source and the settings of an output folder; the same for all of its shards.

    Args:
        source, source_rows: the source as in `open_rows`, and its number of rows.
        tokenizer: folder of a `NextFlowVQModel`, or of a model that holds one.
        fingerprint: fingerprint of that tokenizer.
        shard_size: rows of the source in a shard.
        batch_size: images of one size that are encoded at once; sampled codes depend on it.
        level: resolution at which images are read; `None`: for each the nearest in area.
        top_k, token_share: self-correction, which applies to all images that are trained on, for a share `token_share`
            of the tokens of each scale.
        seed: seed of the sampling.
        on_bad_image: "stop" or "skip".
        image_column, caption_column, edited_image_column: of the source, see [`Columns`].
        row_format: of the shards; those of another one are not continued.
        processor: fingerprint of the model's processor, by which sizes are stored; `None` without one.
    """

    source: str
    source_rows: int
    tokenizer: str
    fingerprint: str
    shard_size: int = 1000
    batch_size: int = 16
    level: int | None = None
    top_k: int = 10
    token_share: float = 0.6
    seed: int = 0
    on_bad_image: str = "stop"
    image_column: str | None = None
    caption_column: str | None = None
    edited_image_column: str | None = None
    row_format: int = ROW_FORMAT
    processor: str | None = None

    def __post_init__(self):
        self.self_correction  # raises for invalid values
        check_on_bad_image(self.on_bad_image)
        if min(self.shard_size, self.batch_size) < 1:
            raise ValueError(
                f"shard_size and batch_size must be at least 1, got {self.shard_size} and {self.batch_size}."
            )
        if abs(self.seed) > MAX_SEED:
            raise ValueError(f"seed must lie between -{MAX_SEED} and {MAX_SEED}, got {self.seed}.")

    @property
    def columns(self) -> Columns:
        return Columns(self.image_column, self.caption_column, self.edited_image_column)

    @property
    def self_correction(self) -> SelfCorrection | None:
        correction = SelfCorrection(self.top_k, self.token_share)
        return correction if self.token_share else None

    @property
    def shards(self) -> range:
        return range(-(-self.source_rows // self.shard_size))

    def rows_of(self, shard: int) -> range:
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.source_rows))

    def generator(self, shard: int, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.seed * 1_000_003 + shard)


def extract_codes(
    source: str | os.PathLike,
    tokenizer: str | os.PathLike,
    output: str | os.PathLike,
    processes: int = 1,
    device: str = "cpu",
    engine: str = "local",
    **settings,
) -> dict[str, int]:
    """Encode the images of all rows.

    Where `tokenizer` is a model with its processor, what packing needs to know is stored too, see `stored_sizes.py`.

    An image that is not trained on has its codes as `image_tokens`. One that is trained on has codes sampled for
    self-correction there, which are read, the nearest codes as `image_labels`, which are written, and its own codes as
    `image_clean_tokens`, which are read where the image is not trained on after all.

    Continues where an earlier call with the same settings was interrupted; the result is that of an uninterrupted call.

    Args:
        source: see `open_rows`.
        tokenizer: folder of a `NextFlowVQModel`, or of a model that holds one.
        output: folder of the shards, or its address in a store that fsspec knows.
        processes: number of processes, each of which makes one shard at a time.
        device: device of the tokenizer.
        engine: one of `ENGINES`: processes of this machine ("local"), or actors of Ray on a cluster or on this machine
            ("ray"). The shards are the same.
        settings: the other fields of [`Extraction`].

    Returns:
        The numbers of `rows` written, rows `skipped`, `shards`, and shards `found`, which existed already.

    Raises:
        ValueError: for a row that cannot be used, an output folder of other settings, or an unknown engine.
        OSError: if a shard cannot be written; the finished ones stay.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {tuple(ENGINES)}, got {engine!r}.")
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}.")
    for name, place in (("source", source), ("output", output)):
        if str(place).startswith("memory://") and (engine != "local" or processes > 1):
            raise ValueError(
                f"{name} {place} is in the memory of this process, which the other processes cannot read; use a folder."
            )
    model, folder = load_vision_tokenizer(tokenizer), open_folder(output)
    # Other processes and machines may have another working folder.
    source, tokenizer = (_absolute(without_file_scheme(place)) for place in (source, tokenizer))
    processor = load_processor(tokenizer)
    fingerprint = None if processor is None else processor_fingerprint(processor)
    extraction = Extraction(source, 0, tokenizer, tokenizer_fingerprint(model), processor=fingerprint, **settings)
    extraction = replace(extraction, source_rows=len(open_rows(source, extraction.columns)[0]))
    if extraction.level is not None:
        model.config.scale_schedules.build(level=extraction.level)  # raises if there is no such level
    if engine == "local" or not device.startswith("cuda"):  # a cluster may have GPUs that this machine lacks
        on_device(torch.empty(0), device)  # raises if there is no such device
    _begin(extraction, folder)
    missing = [shard for shard in extraction.shards if not _is_complete(folder, shard)]
    progress = tqdm(total=len(extraction.shards), initial=len(extraction.shards) - len(missing), unit="shard")
    with note_on_interrupt(lambda: _kept(output, progress.n, progress.total)), progress:
        for _ in ENGINES[engine](missing, extraction, folder, device, processes) if missing else ():
            progress.update()
    return check_codes(output) | {"found": len(extraction.shards) - len(missing)}


def check_codes(output: str | os.PathLike) -> dict[str, int]:
    """Check that every shard of a folder exists and is as it was written; returns `rows`, `skipped` and `shards`.

    Raises:
        ValueError: naming the shards that are missing or damaged.
    """
    folder = open_folder(output)
    if SETTINGS not in folder.names():
        raise ValueError(f"{folder} holds no {SETTINGS}; is it a folder of extract-codes?")
    shards = read_typed(Extraction, _read_json(folder, SETTINGS), f"{folder}/{SETTINGS}").shards
    bad = [_shard(shard) for shard in shards if not _is_complete(folder, shard)]
    if bad:
        raise ValueError(
            f"{folder}: {', '.join(bad)} are missing or damaged; extract once more, which keeps the others."
        )
    notes = [_read_json(folder, _note(shard)) for shard in shards]
    for shard, note in zip(shards, notes):
        if not all(isinstance(note.get(name), int) for name in ("rows", "skipped")):
            raise ValueError(f"{folder}/{_note(shard)} has no numbers of rows; remove it, and extract once more.")
    return {name: sum(note[name] for note in notes) for name in ("rows", "skipped")} | {"shards": len(notes)}


def _begin(extraction: Extraction, folder: Folder):
    """Write the settings, or check that they are those with which the folder was begun."""
    names = folder.names()
    if isinstance(folder, LocalFolder):
        for partial in folder.path.glob(".codes-*"):
            shutil.rmtree(partial)  # left by a call that was killed
    if SETTINGS not in names:
        if any(name.startswith("codes-") for name in names):
            raise ValueError(f"{folder} holds codes without {SETTINGS}; use an empty folder.")
        folder.write(SETTINGS, lambda path: path.write_text(json.dumps(asdict(extraction), indent=2) + "\n"))
    begun = _read_json(folder, SETTINGS)
    for name, value in asdict(extraction).items():
        # The tokenizer may be in another folder now: its fingerprint says whether it is the same.
        if begun.get(name) != value and name != "tokenizer":
            raise ValueError(
                f"{folder} was begun with {name}={begun.get(name)!r}, but now it is {value!r}; use the same, or an "
                "empty folder."
            )


def _write_locally(
    shards: list[int], extraction: Extraction, folder: Folder, device: str, processes: int
) -> Iterator[int]:
    """Write the shards, and yield each when it is done; finished shards stay if another one fails."""
    if processes == 1:
        encoder = _Encoder(extraction, device)
        for shard in shards:
            yield encoder.write(shard, folder)
        return
    with ProcessPoolExecutor(processes, _process_context(), _start_worker, (extraction, device)) as pool:
        futures = [pool.submit(_write_in_worker, shard, folder) for shard in shards]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _process_context() -> multiprocessing.context.BaseContext:
    """How processes start: not forked from this one, since threads of torch and CUDA do not survive a fork, but from
    one that has only imported what they need, where the system can do so.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _write_by_ray(
    shards: list[int], extraction: Extraction, folder: Folder, device: str, processes: int
) -> Iterator[int]:
    """The same with actors of Ray Data: if an actor is killed, another one makes its whole shard."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray, data = import_extra("ray", "ray"), import_extra("ray.data", "ray")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    if device.startswith("cuda") and not ray.cluster_resources().get("GPU"):
        raise ValueError(
            f"device {device} needs a GPU, and the Ray cluster has none; use cpu."
        )  # without this check Ray would wait for a GPU
    data.DataContext.get_current().enable_progress_bars = False  # there is a bar for shards already
    numbers = data.from_items([{"shard": shard} for shard in shards], override_num_blocks=min(len(shards), MAX_BLOCKS))
    written = numbers.map_batches(
        _ShardWriter,
        fn_constructor_args=(extraction, device, folder),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=processes),
        num_cpus=1,
        num_gpus=1 if device.startswith("cuda") else 0,
    )
    for row in written.iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])  # pickled by our own actor
        yield row["shard"]


class _ShardWriter:
    """The work of an actor of Ray. Errors that a user can correct are returned as values, since Ray wraps
    exceptions.
    """

    def __init__(self, extraction: Extraction, device: str, folder: Folder):
        torch.set_num_threads(1)
        self.encoder, self.folder = _Encoder(extraction, device), folder

    def __call__(self, batch: dict) -> dict:
        (shard,) = map(int, batch["shard"])
        error = b""
        try:
            if not _is_complete(self.folder, shard):  # an actor that was killed afterwards may have written it
                self.encoder.write(shard, self.folder)
        except (OSError, ValueError) as raised:
            error = pickle.dumps(raised)
        return {"shard": [shard], "error": [error]}


ENGINES = {"local": _write_locally, "ray": _write_by_ray}


# The encoder of a process of the pool.
_worker: _Encoder


def _start_worker(extraction: Extraction, device: str):
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    torch.set_num_threads(1)
    _worker = _Encoder(extraction, device)


def _write_in_worker(shard: int, folder: Folder) -> int:
    return _worker.write(shard, folder)


class _Encoder:
    """The tokenizer of one process, and the rows."""

    def __init__(self, extraction: Extraction, device: str):
        self.extraction = extraction
        self.model = on_device(load_vision_tokenizer(extraction.tokenizer), device)
        config = self.model.config
        self.image_processor = NextFlowImageProcessor(
            scales=config.scales, patch_size=config.patch_size, levels=config.levels, level=extraction.level
        )
        self.rows, self.root = open_rows(extraction.source, extraction.columns)
        self.processor = load_processor(extraction.tokenizer)

    def write(self, shard: int, folder: Folder) -> int:
        """Write a shard and then its note; a shard without a note does not count."""
        skipped: list[str] = []
        rows = self.encode(shard, skipped)
        written = []

        def write_shard(path: Path):
            _write_parquet(rows, path, self.model.config.codebook_size)
            written.append(_hash(path.read_bytes()))

        folder.write(_shard(shard), write_shard)
        note = {"rows": len(rows), "skipped": len(skipped), "skipped_because": skipped, "sha256": written[0]}
        folder.write(_note(shard), lambda path: path.write_text(json.dumps(note, indent=2) + "\n"))
        return shard

    def encode(self, shard: int, skipped: list[str]) -> list[dict]:
        """The rows of a shard with their codes; the random numbers depend only on the settings and the shard."""
        extraction = self.extraction
        numbers = extraction.rows_of(shard)
        generator = extraction.generator(shard, self.model.device)
        rows = _Slice(self.rows, numbers)
        usable = usable_rows(rows, self._prepare, extraction.on_bad_image, skipped, first=numbers.start)
        result: list[tuple[dict, list[bool], list]] = []
        # Images wait until there are enough of their size and kind (trained on or not), or too many of all kinds.
        waiting: dict[tuple, list[tuple]] = {}
        for number, (sample, pixels) in usable:
            images: list = [None] * len(pixels)
            result.append((self._row(number, sample), sample.trained_images, images))
            for index, (image, trained) in enumerate(zip(pixels, sample.trained_images)):
                kind = (trained, image.shape)
                waiting.setdefault(kind, []).append((images, index, image))
                if len(waiting[kind]) == extraction.batch_size:
                    self._encode_group(trained, waiting.pop(kind), generator)
            if sum(map(len, waiting.values())) > MAX_WAITING * extraction.batch_size:
                kind = next(iter(waiting))
                self._encode_group(kind[0], waiting.pop(kind), generator)
        for (trained, _), group in waiting.items():
            self._encode_group(trained, group, generator)
        rows = [
            row | code_fields([codes for codes, _ in images], trained) | {GRIDS: [grid for _, grid in images]}
            for row, trained, images in result
        ]
        if self.processor is None:
            return rows
        return [row | size_fields(row, self.processor) | {PROCESSOR: extraction.processor} for row in rows]

    def _row(self, number: int, sample: Sample) -> dict:
        messages = [_arrow_message(message) for message in sample.messages]
        return {"messages": messages, FINGERPRINT: self.extraction.fingerprint, "source_row": number}

    def _prepare(self, row: dict) -> tuple[Sample, list[np.ndarray]]:
        """A row and its images as pixel values (3, H, W)."""
        sample = read_row(row, self.root, False, self.image_processor.max_frames)
        return sample, read_pixels(sample, self.image_processor)[1]

    @torch.no_grad()
    def _encode_group(self, trained: bool, group: list[tuple], generator: torch.Generator):
        """Fill in codes and final grids of images of one size, given as (images of a row, index in it, pixel
        values).
        """
        pixels = torch.from_numpy(np.stack([image for _, _, image in group])).to(self.model.device)
        codes = self.model.encode(pixels, self.extraction.self_correction if trained else None, generator)
        grid = self.model.schedule_of(pixels).final_grid
        for (images, index, _), encoded in zip(group, encoded_images(codes)):
            images[index] = encoded, grid


class _Slice:
    """A range of a sequence of rows."""

    def __init__(self, rows: Sequence[dict], numbers: range):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict:
        return self.rows[self.numbers[index]]


def _arrow_message(message: dict) -> dict:
    """A message whose parts all have the same fields, as Arrow needs."""
    parts = [
        {"type": part["type"], "text": part.get("text"), "train": part.get("train")} for part in message["content"]
    ]
    return {"role": message["role"], "content": parts, "train": message.get("train")}


def _write_parquet(rows: list[dict], path: Path, codebook_size: int):
    pa, parquet = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("train", pa.bool_())])
    message = pa.struct([("role", pa.string()), ("content", pa.list_(part)), ("train", pa.bool_())])
    codes = pa.list_(pa.list_(pa.int16() if codebook_size <= 2**15 else pa.int32()))
    grids = pa.list_(pa.list_(pa.int32()))
    fields = [("messages", pa.list_(message)), (TOKENS, codes), (LABELS, codes), (CLEAN_TOKENS, codes), (GRIDS, grids)]
    fields += [(FINGERPRINT, pa.string()), ("source_row", pa.int64()), (PROCESSOR, pa.string())]
    fields += [(name, pa.list_(pa.int32())) for name in SIZES]
    parquet.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), path)


def _absolute(place: str | os.PathLike) -> str:
    return str(place if is_address(place) or not os.path.exists(place) else Path(place).resolve())


def _kept(output: str | os.PathLike, done: int, count: int) -> str:
    return f"{done} of {count} shards are kept in {output}; the same command continues with the others."


def _shard(shard: int) -> str:
    return f"codes-{shard:06d}.parquet"


def _note(shard: int) -> str:
    return f"codes-{shard:06d}.json"


def _is_complete(folder: Folder, shard: int) -> bool:
    try:
        return _read_json(folder, _note(shard)).get("sha256") == _hash(folder.read(_shard(shard)))
    except (FileNotFoundError, ValueError):  # `ValueError` for a note that is no JSON
        return False


def _read_json(folder: Folder, name: str) -> dict:
    try:
        content = load_json(folder.read(name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder}/{name} is not valid JSON; is it complete? {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{folder}/{name} holds no object; is it complete?")
    return content


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
