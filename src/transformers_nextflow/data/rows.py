"""Rows of training data: their schema, in which they are read and checked (docs/data.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..scale_schedule import max_frames_of_level
from ..sequence.messages import read_message
from ..utils.field_errors import FieldError, abbreviate
from ..utils.image_files import read_image
from ..utils.plain_values import as_list
from ..video_processing_nextflow import read_frames
from .row_codes import RowCodes, read_codes
from .row_errors import BadImageError, BadRowError
from .stored_sizes import rows_of_sizes


# Fields that readers add to rows: their number or name, and the folder to which paths of their images are relative.
ROW_NUMBER, ROW_ROOT = "row_number", "row_root"

VIDEO_KINDS = "GIF, WebP, PNG, MP4, MOV, MKV, WebM and AVI"


@dataclass
class Sample:
    """A row that was read.

    Args:
        messages: every content is a list of `{"type": "text", "text": …}` and `{"type": "image"}` parts, with "train"
            if the row has it; a video is one image part for each frame.
        images: the images as the row gives them, in the order of the image parts; empty if it has only codes.
        fields: the field of each image in the row, for messages of errors.
        codes: the codes of its images; `None` without codes.
    """

    messages: list[dict]
    images: list[Any] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    codes: RowCodes | None = None

    @property
    def trained_images(self) -> list[bool]:
        """For each image, in the order of the image parts, whether it is trained on."""
        return [on for part, on in self._parts() if part["type"] == "image"]

    @property
    def num_images(self) -> int:
        return len(self.trained_images)

    def check_learned(self):
        """Raises `BadRowError` if nothing in it is trained on: no part, and no end of an answer."""
        ends = (message.get("train", True) for message in self.messages if message["role"] == "assistant")
        if not any(ends) and not any(on and part.get("text") != "" for part, on in self._parts()):
            raise no_target_error()

    def _parts(self) -> Iterator[tuple[dict, bool]]:
        return ((part, is_trained(message, part)) for message in self.messages for part in message["content"])


def no_target_error() -> BadRowError:
    """The error for a row in which nothing is trained on."""
    return BadRowError("messages", 'none of them is trained on; give an answer or "train": true')


def is_trained(message: dict, part: dict) -> bool:
    """Whether a part of a [`Sample`]'s message is trained on, by its flag, the message's flag, or the role."""
    return part.get("train", message.get("train", message["role"] == "assistant"))


def read_row(
    row: dict, root: str | os.PathLike = ".", with_codes: bool = True, max_frames: int = max_frames_of_level(0)
) -> Sample:
    """Read a row; paths of images are relative to `root`, unless the row names its own. Image files must exist, but are
    not decoded.

    Args:
        with_codes: `False` ignores codes, so that every image must be given.
        max_frames: a video file with more frames is sampled, see `read_frames`.

    Raises:
        BadRowError: naming the field, if the row does not follow the schema.
    """
    sample = Sample([])
    messages = read_messages(row)
    root = row.get(ROW_ROOT, root)
    for number, message in enumerate(messages):
        parts: list[dict] = []
        for index, part in enumerate(message["content"]):
            parts += _read_part(sample, part, f"messages[{number}].content[{index}]", Path(root), max_frames)
        sample.messages.append(message | {"content": parts})
    if not any(part["type"] == "text" for message in sample.messages for part in message["content"]):
        raise BadRowError("messages", 'there is no text part; an unconditional sample has one with "text": ""')
    _fill_in_images(sample, row.get("images"), Path(root))
    sample.codes = read_codes(row, sample.trained_images) if with_codes else None
    missing = [place for place, image in zip(sample.fields, sample.images) if image is None]
    if sample.codes is None and missing:
        nor = ", nor by image_tokens" if with_codes else "; codes that the row holds are not read here"
        raise BadRowError(missing[0], f"the image is given neither here, nor in images{nor}")
    if missing:
        sample.images, sample.fields = [], []
    return sample


def read_messages(row: dict) -> list[dict]:
    """The messages of a row, every content a list of parts. Images are not checked.

    Raises:
        BadRowError: naming the field, for invalid messages or parts.
    """
    check_is_row(row)
    messages = as_list(row.get("messages"))
    if not messages:
        raise BadRowError("messages", f"must be a list of at least one message, got {abbreviate(row.get('messages'))}")
    try:
        return [read_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    except FieldError as error:
        raise BadRowError(error.field, error.problem) from error


def check_is_row(row: Any):
    """Raises `BadRowError` for anything but a row."""
    if not isinstance(row, dict):
        raise BadRowError("row", f"must be an object with messages, got {type(row).__name__}")


def load_image(image: Any, field: str = "image") -> Image.Image:
    """An image of a [`Sample`], decoded.

    Raises:
        BadImageError: if the file is missing or is no image.
    """
    try:
        return read_image(image)
    except ValueError as error:
        raise BadImageError(field, f"the image cannot be read: {error}") from error


class NumberedRows:
    """Rows that hold their number as `ROW_NUMBER`, so that an error in a row can name it."""

    def __init__(self, rows: Sequence[dict]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int):
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict:
        try:
            row = self.rows[index]
            check_is_row(row)  # otherwise a list would count as a pack
        except BadRowError as error:
            raise error.of_row(index) from error
        return row | {ROW_NUMBER: index}

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def in_largest_views(self) -> list[NumberedRows]:
        """The rows as `StageRows` has them in its largest views; rows that do not differ by epochs as they are."""
        has_views = hasattr(self.rows, "in_largest_views")
        return [NumberedRows(rows) for rows in self.rows.in_largest_views()] if has_views else [self]

    def rows_of_sizes(self) -> Iterator[dict] | None:
        """See `rows_of_sizes` of `stored_sizes.py`."""
        stored = rows_of_sizes(self.rows)
        return None if stored is None else (row | {ROW_NUMBER: index} for index, row in enumerate(stored))


def _read_part(sample: Sample, part: dict, place: str, root: Path, max_frames: int) -> list[dict]:
    """The parts of the sample for a part of a row; adds its images to the sample."""
    kind = part["type"]
    if kind == "text":
        return [part]
    if kind == "image":
        images, fields = [_locate(part.get("image"), f"{place}.image", root)], [f"{place}.image"]
    else:
        images, fields = _frames(part.get(kind), f"{place}.{kind}", root, max_frames)
    sample.images += images
    sample.fields += fields
    flag = {"train": part["train"]} if "train" in part else {}
    return [{"type": "image"} | flag for _ in images]


def _frames(video: Any, place: str, root: Path, max_frames: int) -> tuple[list, list[str]]:
    """The images of a video, given as a list of images or as a file for `read_frames`."""
    if frames := as_list(video):
        places = [f"{place}[{number}]" for number in range(len(frames))]
        frames = [_locate(frame, where, root) for frame, where in zip(frames, places)]
        if None in frames:
            raise BadImageError(places[frames.index(None)], "a frame is missing")
        return frames, places
    path = _locate(video, place, root)
    if not isinstance(path, Path):
        raise BadRowError(place, f"must be a list of images, or the path of a video, got {type(video).__name__}")
    try:
        frames = read_frames(path, max_frames)
    except ImportError:
        raise
    except Exception as error:
        problem = f"the video cannot be read: {error} {VIDEO_KINDS} are; give the frames of others as a list"
        raise BadImageError(place, problem) from error
    return frames, [f"{place}[{number}]" for number in range(len(frames))]


def _locate(image: Any, place: str, root: Path):
    """A path that exists, bytes or a PIL image; `None` for none."""
    if isinstance(image, dict):  # the form of images that `datasets` has not decoded
        image = image.get("bytes") or image.get("path")
    if image is None or isinstance(image, bytes | Image.Image):
        return image
    if not isinstance(image, str | os.PathLike):
        raise BadRowError(place, f"must be a path or an image, got {type(image).__name__}")
    path = root / image
    if not os.path.isfile(path):
        raise BadImageError(place, f"there is no file {path}" if len(str(path)) < 300 else "there is no such file")
    return path


def _fill_in_images(sample: Sample, given: Any, root: Path):
    """Read images in a list beside the messages, as in TRL."""
    images = [] if given is None else as_list(given)
    if images is None:
        raise BadRowError("images", f"must be a list of images, got {abbreviate(given)}")
    free = [number for number, image in enumerate(sample.images) if image is None]
    if images and len(images) != len(free):
        raise BadRowError("images", f"holds {len(images)} images for {len(free)} image parts without one")
    for number, (place, image) in enumerate(zip(free, images)):
        sample.fields[place] = f"images[{number}]"
        sample.images[place] = _locate(image, f"images[{number}]", root)
