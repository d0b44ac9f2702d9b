"""The codes of a row's images: their lists or arrays, their checks, and which of them are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..modeling_nextflow_vq import NextFlowVQEncoderOutput
from ..scale_schedule import Grid, ScaleSchedule, ScaleSchedules
from ..utils.field_errors import abbreviate
from ..utils.plain_values import as_list, plain
from .row_errors import BadRowError


TOKENS, LABELS, CLEAN_TOKENS, GRIDS = "image_tokens", "image_labels", "image_clean_tokens", "image_grids"
FINGERPRINT = "tokenizer_fingerprint"


@dataclass
class RowCodes:
    """The codes that a row gives for its images, in the order of the image parts.

    Args:
        tokens, labels, clean: int64 (N,) for each image, the row's `image_tokens`, `image_labels` and
            `image_clean_tokens`; the last two may be `None` for an image without them.
        grids: for each image its final grid (height, width) in cells.
        trained: for each image whether it is trained on.
        fingerprint: fingerprint of the tokenizer of the codes; `None` if the row does not name it.
    """

    tokens: list[np.ndarray]
    labels: list[np.ndarray | None]
    clean: list[np.ndarray | None]
    grids: list[Grid]
    trained: list[bool]
    fingerprint: str | None

    @property
    def read(self) -> list[np.ndarray]:
        """The codes that slots read: those sampled for self-correction only if an image is trained on."""
        images = zip(self.tokens, self.clean, self.trained)
        return [tokens if trained or clean is None else clean for tokens, clean, trained in images]

    @property
    def written(self) -> list[np.ndarray]:
        """The codes to predict if an image is trained on."""
        return [tokens if labels is None else labels for tokens, labels in zip(self.tokens, self.labels)]

    def check(self, schedules: ScaleSchedules | None, codebook_size: int | None, fingerprint: str | None):
        """Check the codes against a tokenizer; for arguments that are `None` there is no check.

        Raises:
            BadRowError: for codes of another tokenizer, codes that do not fill their grids, or lie outside the
                codebook.
        """
        if None not in (fingerprint, self.fingerprint) and fingerprint != self.fingerprint:
            those = f"the codes come from the tokenizer {self.fingerprint}, the model's is {fingerprint}"
            raise BadRowError(FINGERPRINT, f"{those}; extract them again")
        for index, grid in enumerate(self.grids):
            place = f"{GRIDS}[{index}]"
            expected = None if schedules is None else schedule_of(schedules, grid, place).num_tokens
            for name, images in ((TOKENS, self.tokens), (LABELS, self.labels), (CLEAN_TOKENS, self.clean)):
                if images[index] is not None:
                    _check_image(images[index], f"{name}[{index}]", grid, expected, codebook_size)


class EncodedImage(NamedTuple):
    """An image's codes from `NextFlowVQModel.encode`: codes to read and to predict in training, and its clean codes."""

    tokens: list[int]
    labels: list[int]
    clean: list[int]


def encoded_images(output: NextFlowVQEncoderOutput) -> Iterator[EncodedImage]:
    """The codes of each image of a batch."""
    lists = (output.image_tokens, output.image_labels, output.image_clean_tokens)
    return map(EncodedImage._make, zip(*(codes.tolist() for codes in lists)))


def code_fields(images: Sequence[EncodedImage], trained: Sequence[bool]) -> dict[str, list | None]:
    """The fields of codes of a row, from its images and whether each is trained on.

    Images that are not trained on have only clean codes, and `image_clean_tokens` are given only if they differ.
    """
    images = [image if on else EncodedImage(*3 * [image.clean]) for image, on in zip(images, trained)]
    clean = [None if image.tokens == image.labels == image.clean else image.clean for image in images]
    fields = {TOKENS: [image.tokens for image in images], LABELS: [image.labels for image in images]}
    return fields | {CLEAN_TOKENS: clean if any(clean) else None}


def read_codes(row: dict, trained: list[bool]) -> RowCodes | None:
    """The codes of a row, with an entry of `trained` for each of its images; `None` if it gives none.

    Raises:
        BadRowError: naming the field, for anything but a list of whole numbers for each image, lists of one image that
            differ in length, and codes sampled for self-correction without clean codes that must be read or labels.
    """
    if all(row.get(name) is None for name in (TOKENS, LABELS, CLEAN_TOKENS, GRIDS)):
        return None
    fingerprint = row.get(FINGERPRINT)
    if not isinstance(fingerprint, str | None):
        raise BadRowError(FINGERPRINT, f"must be a string, got {abbreviate(fingerprint)}")
    tokens, grids = _arrays(row, TOKENS, len(trained)), read_grids(row, len(trained))
    labels, clean = (
        [None] * len(trained) if row.get(name) is None else _arrays(row, name, len(trained), optional=True)
        for name in (LABELS, CLEAN_TOKENS)
    )
    for index, own in enumerate(zip(tokens, labels, clean, trained)):
        _check_equal_lengths(index, *own)
    return RowCodes(tokens, labels, clean, grids, trained, fingerprint)


def read_grids(row: dict, count: int | None = None) -> list[Grid]:
    """The final grids (height, width) of a row's images; `count` of them, if it is given.

    Raises:
        BadRowError: naming the field, for invalid grids.
    """
    grids = _arrays(row, GRIDS, count)
    for index, grid in enumerate(grids):
        if len(grid) != 2 or grid.min() < 1:
            raise BadRowError(
                f"{GRIDS}[{index}]", f"must be height and width in cells, got {abbreviate(grid.tolist())}"
            )
    return [tuple(grid.tolist()) for grid in grids]


def schedule_of(schedules: ScaleSchedules, grid: Grid, place: str) -> ScaleSchedule:
    """The schedule with this final grid. Raises `BadRowError` that names `place` if there is none."""
    try:
        return schedules.for_size(*(side * schedules.patch_size for side in grid))
    except ValueError as error:
        raise BadRowError(place, f"{list(grid)} is not a final grid: {error}") from error


def _arrays(row: dict, name: str, count: int | None, optional: bool = False) -> list[np.ndarray | None]:
    """The arrays (N,) of a field, one for each image; with `optional` `None` for an image that has a null."""
    value = row.get(name)
    if value is None:
        if count:
            raise BadRowError(name, f"the messages hold {count} images, but there are none here")
        return []
    entries = as_list(value)
    if entries is None:
        raise BadRowError(name, f"must be a list with an entry for each image, got {abbreviate(value)}")
    if count is not None and len(entries) != count:
        raise BadRowError(name, f"the messages hold {count} images, but there are {len(entries)} here")
    return [
        None if optional and entry is None else _whole_numbers(entry, f"{name}[{index}]")
        for index, entry in enumerate(entries)
    ]


def _whole_numbers(value: Any, place: str) -> np.ndarray:
    """A list or array of whole numbers as int64 (N,). Fractions and truth values are errors."""
    value = plain(value)
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, list | tuple):
        if strange := [
            kind for kind in set(map(type, value)) if not issubclass(kind, int | np.integer) or kind is bool
        ]:
            found = next(entry for entry in value if type(entry) in strange)
            raise BadRowError(place, f"must hold whole numbers, got {abbreviate(found)}")
        try:
            return np.array(value, dtype=np.int64)
        except OverflowError as error:
            raise BadRowError(place, f"holds numbers beyond any codebook: {error}") from error
    if not isinstance(value, np.ndarray):
        raise BadRowError(place, f"must be a list of whole numbers, got {abbreviate(value)}")
    if value.ndim != 1 or value.dtype.kind not in "iu":
        raise BadRowError(place, f"must be one list of whole numbers, got {value.dtype} of shape {value.shape}")
    if value.size and int(value.max()) > np.iinfo(np.int64).max:
        raise BadRowError(place, f"holds numbers beyond any codebook: {value.max()}")
    return np.ascontiguousarray(value, dtype=np.int64)


def _check_equal_lengths(
    index: int, tokens: np.ndarray, labels: np.ndarray | None, clean: np.ndarray | None, trained: bool
):
    """Check that the lists of one image fit together."""
    for name, codes in ((LABELS, labels), (CLEAN_TOKENS, clean)):
        if codes is not None and len(codes) != len(tokens):
            raise BadRowError(f"{name}[{index}]", f"holds {len(codes)} codes, but {TOKENS}[{index}] {len(tokens)}")
    if clean is not None and labels is None:
        raise BadRowError(
            f"{LABELS}[{index}]", f"is missing; beside {CLEAN_TOKENS}, {TOKENS} are sampled and cannot be the labels"
        )
    if not trained and clean is None and labels is not None and not np.array_equal(tokens, labels):
        raise BadRowError(
            f"{TOKENS}[{index}]",
            f"differ from {LABELS}, so they are sampled for self-correction, but the image is not trained on and is "
            f"read as it is; give its codes as {CLEAN_TOKENS}, or extract the codes again",
        )


def _check_image(codes: np.ndarray, place: str, grid: Grid, expected: int | None, codebook_size: int | None):
    if expected is not None and len(codes) != expected:
        raise BadRowError(place, f"the grid {list(grid)} takes {expected} codes, got {len(codes)}")
    if not len(codes):
        raise BadRowError(place, "holds no codes")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or (codebook_size is not None and high >= codebook_size):
        end = "on" if codebook_size is None else f"to {codebook_size - 1}"
        raise BadRowError(place, f"codes run from 0 {end}, got {low} to {high}")
