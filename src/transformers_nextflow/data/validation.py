"""Checks of whole data sets, which name the row and the field of each problem."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig

from ..image_processing_nextflow import NextFlowImageProcessor
from ..processing_nextflow import NextFlowProcessor
from ..scale_schedule import ScaleSchedules
from ..utils.checkpoint_checks import loading_errors
from ..utils.folder_parts import load_part
from ..vision_tokenizer.fingerprint import tokenizer_fingerprint
from .columns import Columns
from .row_codes import TOKENS
from .row_encoding import encode_sample, read_images
from .row_errors import BadImageError, BadRowError
from .rows import Sample, read_row
from .sources import open_rows
from .vision_tokenizer import load_processor, load_vision_tokenizer


ON_BAD_IMAGE = ("stop", "skip")
# The largest number of problems that a report names; it counts all of them.
MAX_NAMED = 20


@dataclass
class ValidationReport:
    """The result of a check of rows.

    Args:
        rows, images: how many were checked.
        skipped: number of rows that training would skip because of an image.
        problems: the first `MAX_NAMED` problems of rows that cannot be used, such as "row 3, messages[0].role: …";
            `skipped_because` has the same for skipped rows.
        num_problems: the number of all problems.
    """

    rows: int = 0
    images: int = 0
    skipped: int = 0
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    skipped_because: list[str] = field(default_factory=list)


def check_on_bad_image(value: str):
    """Raises `ValueError` for anything but "stop" and "skip"."""
    if value not in ON_BAD_IMAGE:
        raise ValueError(f"on_bad_image must be one of {ON_BAD_IMAGE}, got {value!r}.")


def usable_rows(
    rows: Iterable[dict], prepare: Callable[[dict], Any], on_bad_image: str, skipped: list[str], first: int = 0
) -> Iterator[tuple[int, Any]]:
    """The number of each usable row, counted from `first`, and the result of `prepare` for it.

    With `on_bad_image="skip"` rows with an image that is missing or cannot be decoded are added to `skipped`.

    Raises:
        ValueError: naming the row and the field of any other problem, and with "stop" of a bad image.
    """
    for number, row in enumerate(_rows_or_errors(rows), start=first):
        try:
            if isinstance(row, BadRowError):
                raise row
            yield number, prepare(row)
        except BadImageError as error:
            problem = f"row {number}, {error}"
            if on_bad_image == "stop":
                raise ValueError(f"{problem}; on_bad_image='skip' leaves such rows out.") from error
            skipped.append(problem)
        except BadRowError as error:
            raise ValueError(f"row {number}, {error}") from error


def validate_rows(
    rows: Iterable[dict],
    root: str | os.PathLike = ".",
    schedules: ScaleSchedules | None = None,
    codebook_size: int | None = None,
    fingerprint: str | None = None,
    on_bad_image: str = "stop",
    processor: NextFlowProcessor | None = None,
    max_positions: int | None = None,
) -> ValidationReport:
    """Read every row as training does, and decode every image that training would. Problems in rows are reported and
    not raised.

    Args:
        root: the folder to which paths of images are relative.
        schedules, codebook_size, fingerprint: those of the tokenizer from which codes must come; `None`: not checked.
        on_bad_image: whether rows with an image that cannot be decoded are problems ("stop") or skipped ("skip").
        processor: the processor of the model to train; its image processor's schedules are used. Without one, the chat
            template is not applied to texts.
        max_positions: how many positions that model has; `None`, or without a processor: not checked.
    """
    check_on_bad_image(on_bad_image)
    if processor is not None:
        image_processor, schedules = processor.image_processor, processor.image_processor.scale_schedules
    elif schedules is not None:
        image_processor = NextFlowImageProcessor(schedules.sides, schedules.patch_size, schedules.levels)
    else:
        image_processor = NextFlowImageProcessor()
    report, kinds = ValidationReport(), _ConsistentCodes()
    for number, row in enumerate(_rows_or_errors(rows)):
        report.rows += 1
        try:
            if isinstance(row, BadRowError):
                raise row
            sample = read_row(row, root, max_frames=image_processor.max_frames)
            report.images += sample.num_images
            if processor is not None:
                encode_sample(sample, processor, codebook_size, fingerprint, max_positions).check_learned()
            else:
                read_images(sample, image_processor, schedules, codebook_size, fingerprint)
                sample.check_learned()
            kinds.check(number, sample)
        except BadRowError as error:
            skip = isinstance(error, BadImageError) and on_bad_image == "skip"
            named = report.skipped_because if skip else report.problems
            report.skipped += skip
            report.num_problems += not skip
            if len(named) < MAX_NAMED:
                named.append(f"row {number}, {error}")
    return report


def validate_source(
    source: str | os.PathLike,
    model: str | None = None,
    on_bad_image: str = "stop",
    columns: Columns | None = None,
) -> ValidationReport:
    """The report of a source (see `open_rows`), for the model or the tokenizer in the folder `model`."""
    rows, root = open_rows(source, columns)
    if model is None:
        return validate_rows(rows, root, on_bad_image=on_bad_image)
    vq_model = load_vision_tokenizer(model)
    config = vq_model.config
    processor = load_processor(model)
    with loading_errors(model):
        text_config = getattr(load_part(AutoConfig, "model", model), "text_config", None)
    return validate_rows(
        rows, root, config.scale_schedules, config.codebook_size, tokenizer_fingerprint(vq_model), on_bad_image,
        processor, getattr(text_config, "max_position_embeddings", None),
    )  # fmt: skip


class _ConsistentCodes:
    """Checks that all rows with images have codes or none has, since a batch must be of one kind."""

    def __init__(self):
        self.first: tuple[int, bool] | None = None

    def check(self, number: int, sample: Sample):
        """Raises `BadRowError` for a row with codes if the first row with images had none, and the other way round."""
        if not sample.num_images:
            return
        has_codes = sample.codes is not None
        self.first = self.first or (number, has_codes)
        if has_codes != self.first[1]:
            those = "codes, this row none" if self.first[1] else "no codes, this row does"
            raise BadRowError(TOKENS, f"row {self.first[0]} holds {those}; extract the codes of all rows, or of none")


def _rows_or_errors(rows: Iterable[dict]) -> Iterator[dict | BadRowError]:
    """The rows; an entry that is no row is replaced by the error."""
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        yield from rows
        return
    for index in range(len(rows)):
        try:
            yield rows[index]
        except BadRowError as error:
            yield error
