"""Checks of whole data sets, which name the row and the field of what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..scale_schedule import ScaleSchedules
from .rows import BadPictureError, BadRowError, Sample, load_picture, open_rows, read_row
from .vision_tokenizer import load_vision_tokenizer, tokenizer_fingerprint


ON_BAD_PICTURE = ("stop", "skip")
# Problems that a report names one by one; it counts them all.
MOST_NAMED = 20


@dataclass
class ValidationReport:
    """What a check of rows found.

    Args:
        rows, pictures: how many were looked at.
        skipped: rows that training would leave out because of a picture.
        problems: "row 3, messages[0].role: …" of rows that cannot be used, the first `MOST_NAMED`; likewise
            `skipped_because`.
        num_problems: of all.
    """

    rows: int = 0
    pictures: int = 0
    skipped: int = 0
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    skipped_because: list[str] = field(default_factory=list)


def check_on_bad_picture(value: str):
    if value not in ON_BAD_PICTURE:
        raise ValueError(f"on_bad_picture must be one of {ON_BAD_PICTURE}, got {value!r}.")


def usable_rows(
    rows: Iterable[dict], prepare: Callable[[dict], Any], on_bad_picture: str, skipped: list[str], first: int = 0
) -> Iterator[tuple[int, Any]]:
    """Number of each usable row, counted from `first`, and what `prepare` makes of it.

    Rows with a picture that is missing or does not decode are added to `skipped` with `on_bad_picture="skip"`.

    Raises:
        ValueError: naming the row and the field of whatever else is wrong, and of a bad picture with "stop".
    """
    for number, row in enumerate(_rows_or_errors(rows), start=first):
        try:
            if isinstance(row, BadRowError):
                raise row
            yield number, prepare(row)
        except BadPictureError as error:
            problem = f"row {number}, {error}"
            if on_bad_picture == "stop":
                raise ValueError(f"{problem}; on_bad_picture='skip' leaves such rows out.") from error
            skipped.append(problem)
        except BadRowError as error:
            raise ValueError(f"row {number}, {error}") from error


def validate_rows(
    rows: Iterable[dict],
    root: str | os.PathLike = ".",
    schedules: ScaleSchedules | None = None,
    codebook_size: int | None = None,
    fingerprint: str | None = None,
    on_bad_picture: str = "stop",
) -> ValidationReport:
    """Look at every row and decode every picture; nothing is raised for what rows hold.

    Args:
        root: what paths of pictures are relative to.
        schedules, codebook_size, fingerprint: of the tokenizer that codes must come from; `None`: not checked.
        on_bad_picture: whether rows with a picture that does not decode are problems ("stop") or left out ("skip").
    """
    check_on_bad_picture(on_bad_picture)
    report = ValidationReport()
    for number, row in enumerate(_rows_or_errors(rows)):
        report.rows += 1
        try:
            if isinstance(row, BadRowError):
                raise row
            sample = read_row(row, root)
            report.pictures += sample.num_pictures
            for place, picture in zip(sample.fields, sample.pictures):
                check_size(load_picture(picture, place), place, schedules)
            check_codes_of(sample, schedules, codebook_size, fingerprint)
        except BadRowError as error:
            skip = isinstance(error, BadPictureError) and on_bad_picture == "skip"
            named = report.skipped_because if skip else report.problems
            report.skipped += skip
            report.num_problems += not skip
            if len(named) < MOST_NAMED:
                named.append(f"row {number}, {error}")
    return report


def validate_source(
    source: str | os.PathLike, model: str | None = None, on_bad_picture: str = "stop"
) -> ValidationReport:
    """The report of a file or folder (see `open_rows`), whose codes are for the tokenizer in the folder `model`."""
    rows, root = open_rows(source)
    if model is None:
        return validate_rows(rows, root, on_bad_picture=on_bad_picture)
    vq_model = load_vision_tokenizer(model)
    config = vq_model.config
    return validate_rows(
        rows, root, config.scale_schedules, config.codebook_size, tokenizer_fingerprint(vq_model), on_bad_picture
    )


def check_size(picture, place: str, schedules: ScaleSchedules | None):
    """Raises `BadPictureError` for a picture whose ratio no schedule draws."""
    if schedules is None:
        return
    try:
        schedules.nearest(picture.height, picture.width)
    except ValueError as error:
        raise BadPictureError(place, str(error)) from error


def check_codes_of(
    sample: Sample, schedules: ScaleSchedules | None, codebook_size: int | None, fingerprint: str | None
):
    """Raises `BadRowError` for codes that do not fill their grids, or are another tokenizer's."""
    if sample.image_tokens is None:
        return
    if None not in (fingerprint, sample.fingerprint) and fingerprint != sample.fingerprint:
        raise BadRowError(
            "tokenizer_fingerprint",
            f"the codes come from the tokenizer {sample.fingerprint}, the model's is {fingerprint}; extract them anew",
        )
    for name, pictures in (("image_tokens", sample.image_tokens), ("image_labels", sample.image_labels)):
        for number, (codes, grid) in enumerate(zip(pictures, sample.image_grids)):
            place = f"{name}[{number}]"
            if schedules is not None:
                expected = _num_tokens(schedules, grid, f"image_grids[{number}]")
                if len(codes) != expected:
                    raise BadRowError(place, f"the grid {list(grid)} takes {expected} codes, got {len(codes)}")
            if codebook_size is not None and len(codes) and not 0 <= min(codes) <= max(codes) < codebook_size:
                raise BadRowError(place, f"codes run from 0 to {codebook_size - 1}, got {min(codes)} to {max(codes)}")


def _num_tokens(schedules: ScaleSchedules, grid, place: str) -> int:
    try:
        return schedules.for_size(*(int(side) * schedules.patch_size for side in grid)).num_tokens
    except (TypeError, ValueError) as error:
        raise BadRowError(place, f"{list(grid)} is no final grid: {error}") from error


def _rows_or_errors(rows: Iterable[dict]) -> Iterator[dict | BadRowError]:
    """The rows; in place of one that is no row at all, the error."""
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        yield from rows
        return
    for index in range(len(rows)):
        try:
            yield rows[index]
        except BadRowError as error:
            yield error
