"""One row of training data: what may stand in it, read and checked in one place (docs/data.md)."""

from __future__ import annotations

import importlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from ..films import read_frames


ROLES = ("system", "user", "assistant")
FINGERPRINT = "tokenizer_fingerprint"
FILMS = ("video", "film")  # one thing; chat templates of transformers say "video"
ROW_NUMBER = "row_number"
ROW_FIELDS = {"messages", "images", "image_tokens", "image_labels", "image_grids", FINGERPRINT}


class BadRowError(ValueError):
    """A row that cannot be used; `field` says where in it, as `messages[0].content[1].image`."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem

    def of_row(self, number: int) -> BadRowError:
        """The same error, named with the row's number."""
        return type(self)(f"row {number}, {self.field}", self.problem)


class BadPictureError(BadRowError):
    """A picture that is missing or does not decode."""


@dataclass
class Sample:
    """A row that was read.

    Args:
        messages: every content is a list of `{"type": "text", "text": …}` and `{"type": "image"}` parts, with "train"
            where the row has it; a film is one image part for each frame.
        pictures: what the row gives of each picture, in the order of the image parts; empty if it has codes alone.
        fields: where each picture stands in the row, for messages of errors.
        image_tokens, image_labels, image_grids: codes to read, codes to write, final grids; `None` without codes.
        fingerprint: of the tokenizer of the codes; `None` where the row does not say.
    """

    messages: list[dict]
    pictures: list[Any] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    image_tokens: list[list[int]] | None = None
    image_labels: list[list[int]] | None = None
    image_grids: list[list[int]] | None = None
    fingerprint: str | None = None

    @property
    def num_pictures(self) -> int:
        return sum(part["type"] == "image" for message in self.messages for part in message["content"])


def read_row(row: dict, root: str | os.PathLike = ".") -> Sample:
    """Read a row; paths of pictures are relative to `root`. Pictures are looked for, not decoded.

    Raises:
        BadRowError: naming the field, if the row does not follow the schema.
    """
    if not isinstance(row, dict):
        raise BadRowError("row", f"must be an object with messages, got {type(row).__name__}")
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRowError("messages", f"must be a list of at least one message, got {messages!r}")
    sample = Sample([])
    for number, message in enumerate(messages):
        _read_message(sample, message, f"messages[{number}]", Path(root))
    if not any(part["type"] == "text" for message in sample.messages for part in message["content"]):
        raise BadRowError("messages", 'there is no text part; an unconditional sample has one with "text": ""')
    if images := row.get("images"):
        _take_images(sample, images, Path(root))
    _read_codes(sample, row)
    missing = [place for place, picture in zip(sample.fields, sample.pictures) if picture is None]
    if sample.image_tokens is None and missing:
        raise BadRowError(missing[0], "the picture is given neither here, nor in images, nor by image_tokens")
    if missing:
        sample.pictures, sample.fields = [], []
    return sample


def load_picture(picture: Any, field: str = "picture") -> Image.Image:
    """A picture of a [`Sample`], decoded.

    Raises:
        BadPictureError: if the file is missing or is no picture.
    """
    try:
        if isinstance(picture, Image.Image):
            picture.load()
            return picture
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            opened.load()
            return opened.copy() if getattr(opened, "n_frames", 1) == 1 else opened.convert("RGBA")
    # PIL raises SyntaxError for some broken PNGs, and its own for pictures that would fill the memory.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadPictureError(field, f"the picture cannot be read: {error}") from error


def open_rows(source: str | os.PathLike) -> tuple[Sequence[dict], Path]:
    """The rows of a file or a folder, by number, and the folder that its pictures' paths are relative to.

    A `.jsonl` file with pictures beside it, `.parquet` files or a folder of them, or a folder that
    `Dataset.save_to_disk` wrote.

    Raises:
        ValueError: for anything else.
    """
    source = Path(source)
    if source.suffix in (".jsonl", ".json") and source.is_file():
        return JsonLines(source), source.parent
    parquet = [source] if source.suffix == ".parquet" else sorted(source.glob("*.parquet")) if source.is_dir() else []
    if source.exists() and (parquet or (source / "dataset_info.json").is_file()):
        datasets = import_extra("datasets")
        files = [str(file) for file in parquet]
        rows = datasets.Dataset.from_parquet(files) if files else datasets.load_from_disk(str(source))
        if isinstance(getattr(rows.features.get("images"), "feature", None), datasets.Image):
            # Decoded by us, so that a broken picture is told by its row and field.
            rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
        return rows, source
    raise ValueError(f"{source} is no .jsonl or .parquet file, and no folder of .parquet files or of save_to_disk.")


def import_extra(name: str) -> ModuleType:
    """A module of the extra "train". Raises `ValueError` that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"This needs {name}: pip install transformers-nextflow[train].") from error


class JsonLines:
    """Rows of a JSON Lines file, by number; empty lines are none."""

    def __init__(self, path: Path):
        self.path, self.offsets = path, []
        with open(path, "rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    self.offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            try:
                return json.loads(file.readline())
            except ValueError as error:
                raise BadRowError("row", f"is no JSON: {error}") from error

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))


class NumberedRows:
    """Rows by number that hold their number as `ROW_NUMBER`, so that an error in one can name it."""

    def __init__(self, rows: Sequence[dict]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        try:
            row = self.rows[index]
        except BadRowError as error:
            raise error.of_row(index) from error
        return row | {ROW_NUMBER: index} if isinstance(row, dict) else row

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))


def _read_message(sample: Sample, message: Any, place: str, root: Path):
    if not isinstance(message, dict):
        raise BadRowError(place, f"must be an object with role and content, got {message!r}")
    if message.get("role") not in ROLES:
        raise BadRowError(f"{place}.role", f"must be one of {ROLES}, got {message.get('role')!r}")
    content = message.get("content")
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, list) or not content:
        raise BadRowError(f"{place}.content", f"must be a text or a list of parts, got {content!r}")
    parts: list[dict] = []
    for number, part in enumerate(content):
        parts += _read_part(sample, part, f"{place}.content[{number}]", root)
    sample.messages.append({"role": message["role"], "content": parts} | _train_flag(message, place))


def _read_part(sample: Sample, part: Any, place: str, root: Path) -> list[dict]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image", *FILMS):
        raise BadRowError(f"{place}.type", f"must be text, image or video, got {part!r}")
    flag = _train_flag(part, place)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadRowError(f"{place}.text", f"must be a string, got {part.get('text')!r}")
        return [{"type": "text", "text": part["text"]} | flag]
    if kind == "image":
        pictures, fields = [_locate(part.get("image"), f"{place}.image", root)], [f"{place}.image"]
    else:
        pictures, fields = _frames(part.get(kind), f"{place}.{kind}", root)
    sample.pictures += pictures
    sample.fields += fields
    return [{"type": "image"} | flag for _ in pictures]


def _train_flag(holder: dict, place: str) -> dict:
    flag = holder.get("train")
    if flag is not None and not isinstance(flag, bool):
        raise BadRowError(f"{place}.train", f"must be true or false, got {flag!r}")
    return {} if flag is None else {"train": flag}


def _frames(film: Any, place: str, root: Path) -> tuple[list, list[str]]:
    """The pictures of a film: a list of them, or a file as `read_frames` takes it."""
    if isinstance(film, list) and film:
        places = [f"{place}[{number}]" for number in range(len(film))]
        frames = [_locate(frame, where, root) for frame, where in zip(film, places)]
        if None in frames:
            raise BadPictureError(places[frames.index(None)], "a frame is missing")
        return frames, places
    path = _locate(film, place, root)
    if not isinstance(path, Path):
        raise BadRowError(place, f"must be a list of pictures, or the path of a film, got {type(film).__name__}")
    try:
        frames = read_frames(path)
    except ValueError as error:
        problem = f"the film cannot be read: {error} GIF, WebP, PNG and MP4 are; give the frames of others as a list"
        raise BadPictureError(place, problem) from error
    return frames, [f"{place}[{number}]" for number in range(len(frames))]


def _locate(picture: Any, place: str, root: Path):
    """A path that exists, bytes or a PIL picture; `None` for none."""
    if isinstance(picture, dict):  # as `datasets` keeps pictures that it has not decoded
        picture = picture.get("bytes") or picture.get("path")
    if picture is None or isinstance(picture, bytes | Image.Image):
        return picture
    if not isinstance(picture, str | os.PathLike):
        raise BadRowError(place, f"must be a path or a picture, got {type(picture).__name__}")
    path = root / picture
    if not path.is_file():
        raise BadPictureError(place, f"there is no file {path}")
    return path


def _take_images(sample: Sample, images: list, root: Path):
    """TRL's way: pictures in a list beside the messages."""
    free = [number for number, picture in enumerate(sample.pictures) if picture is None]
    if len(images) != len(free):
        raise BadRowError("images", f"holds {len(images)} pictures for {len(free)} image parts without one")
    for number, (place, picture) in enumerate(zip(free, images)):
        sample.fields[place] = f"images[{number}]"
        sample.pictures[place] = _locate(picture, f"images[{number}]", root)


def _read_codes(sample: Sample, row: dict):
    tokens, grids = row.get("image_tokens"), row.get("image_grids")
    if tokens is None and grids is None:
        return
    labels = row.get("image_labels")
    labels = tokens if labels is None else labels
    for name, value in (("image_tokens", tokens), ("image_grids", grids), ("image_labels", labels)):
        if value is None or len(value) != sample.num_pictures:
            found = "none" if value is None else len(value)
            raise BadRowError(name, f"the messages hold {sample.num_pictures} pictures, but there are {found} here")
    sample.image_tokens, sample.image_labels, sample.image_grids = tokens, labels, grids
    sample.fingerprint = row.get(FINGERPRINT)
