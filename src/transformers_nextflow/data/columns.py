"""Rows of an image and its caption, or of an image, an instruction and the edited image, as conversations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..utils.field_errors import shown
from .row_errors import BadImageError, BadRowError
from .rows import check_is_row


# How columns are called that nobody names, the likeliest first. A WebDataset's are the files' extensions.
IMAGES = ("input_image", "original_image", "source_image", "image", "img", "file_name", "jpg", "jpeg", "png", "webp")
EDITED_IMAGES = ("edited_image", "output_image", "target_image", "edited")
CAPTIONS = ("text", "caption", "prompt", "instruction", "edit_prompt", "edit", "txt", "description")
# Of `datasets` for folders without metadata: the folder's name.
CLASS = "label"


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold what; `None` leaves it to be found. `json.caption` is a field inside of one.

    Args:
        image: an image.
        caption: what it shows; or, with an edited image, what is done to it.
        edited_image: what comes of it.
    """

    image: str | None = None
    caption: str | None = None
    edited_image: str | None = None

    @property
    def are_named(self) -> bool:
        return any((self.image, self.caption, self.edited_image))

    def found_among(self, names: Collection[str], images: Collection[str] = ()) -> Columns:
        """The columns with what was left open.

        Args:
            names: of all columns there are.
            images: of those that are known to hold images.

        Raises:
            ValueError: for one that is not there, or where no column is one of images.
        """
        for option, name in (("image", self.image), ("caption", self.caption), ("edited-image", self.edited_image)):
            if name is not None and name.partition(".")[0] not in names:
                raise ValueError(f"--{option}-column {name!r} is no column; there are {', '.join(sorted(names))}.")
        found = replace(
            self,
            edited_image=self.edited_image or _first(EDITED_IMAGES, names),
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
            classes: names of the classes whose numbers the caption column holds.

        Raises:
            BadRowError: naming the column, for what is no text or lacks an image.
        """
        check_is_row(row)
        text = "" if self.caption is None else _value(row, self.caption)
        if classes is not None and isinstance(text, int):
            text = classes[text]
        if not isinstance(text, str):
            raise BadRowError(str(self.caption), f"must be a text, got {shown(text)}")
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
    """Rows of columns, by number, as conversations."""

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
