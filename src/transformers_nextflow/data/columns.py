"""Turns rows of an image and a caption, or of an image, an instruction and an edited image, into conversations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..utils.field_errors import abbreviate
from .row_errors import BadImageError, BadRowError
from .rows import check_is_row


# The usual names of columns, the likeliest first. Those of WebDataset are extensions of files.
IMAGES = ("input_image", "original_image", "source_image", "image", "img", "file_name", "jpg", "jpeg", "png", "webp")
EDITED_IMAGES = ("edited_image", "output_image", "target_image", "edited")
CAPTIONS = ("text", "caption", "prompt", "instruction", "edit_prompt", "edit", "txt", "description")
# The column in which `datasets` puts the name of the subfolder, for folders without metadata.
CLASS = "label"


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a data set; `None` means that the column is found by its name. `json.caption` is a field
    inside of a column.

    Args:
        image: the column of images.
        caption: the column of captions; with edited images, of instructions.
        edited_image: the column of edited images.
    """

    image: str | None = None
    caption: str | None = None
    edited_image: str | None = None

    @property
    def are_named(self) -> bool:
        return any((self.image, self.caption, self.edited_image))

    def found_among(self, names: Collection[str], images: Collection[str] = ()) -> Columns:
        """The columns, with the missing names found.

        Args:
            names: names of all columns.
            images: names of columns that are known to hold images.

        Raises:
            ValueError: for a column that does not exist, or if no column of images is found.
        """
        for option, name in (("image", self.image), ("caption", self.caption), ("edited-image", self.edited_image)):
            if name is not None and name.partition(".")[0] not in names:
                raise ValueError(
                    f"--{option}-column {name!r} is not a column; the columns are {', '.join(sorted(names))}."
                )
        found = replace(
            self,
            # A column that is named for images to draw is not that of edited ones.
            edited_image=self.edited_image or _first(EDITED_IMAGES, [name for name in names if name != self.image]),
            caption=self.caption or _first(CAPTIONS, names),
        )
        left = [name for name in images if name != found.edited_image]
        image = self.image or _first(IMAGES, names) or (left[0] if len(left) == 1 else None)
        if image is None:
            raise ValueError(
                f"No column is known to hold images; there are {', '.join(sorted(names))}. Name it by --image-column."
            )
        return replace(found, image=image)

    def conversation(self, row: Any, classes: Sequence[str] | None = None) -> dict:
        """The row as messages; without a caption column the prompt is empty.

        Args:
            classes: names of classes, if the caption column holds their numbers.

        Raises:
            BadRowError: naming the column, for a caption that is no text, the number of no class, or a missing image.
        """
        check_is_row(row)
        text = "" if self.caption is None else _value(row, self.caption)
        if classes is not None and isinstance(text, int):
            # `datasets` writes -1 for an image without a class, which would be the last one.
            if not 0 <= text < len(classes):
                raise BadRowError(str(self.caption), f"must be a class from 0 to {len(classes) - 1}, got {text}")
            text = classes[text]
        if not isinstance(text, str):
            raise BadRowError(str(self.caption), f"must be a text, got {abbreviate(text)}")
        asked = [{"type": "text", "text": text}]
        if self.edited_image is None:
            return _exchange(asked, self._image(row, self.image))
        return _exchange([self._image(row, self.image), *asked], self._image(row, self.edited_image))

    def _image(self, row: dict, column: str | None) -> dict:
        image = _value(row, str(column))
        if image is None:
            raise BadImageError(str(column), "the image is missing")
        return {"type": "image", "image": image}


class ConversationRows:
    """Rows of columns as conversations, read by number."""

    def __init__(self, rows: Sequence[dict], columns: Columns, classes: Sequence[str] | None = None):
        self.rows, self.columns, self.classes = rows, columns, classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.columns.conversation(self.rows[index], self.classes)

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))


def _exchange(asked: list[dict], image: dict) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": [image]}]}


def _first(known: Sequence[str], names: Collection[str]) -> str | None:
    return next((name for name in known if name in names), None)


def _value(row: dict, column: str) -> Any:
    if column in row:
        return row[column]
    for name in column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row
