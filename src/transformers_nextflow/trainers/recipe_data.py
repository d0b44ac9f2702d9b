"""The rows of a stage: some drawings turned round, some without their prompts, pictures of the stage's level."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ..data.rows import load_picture, read_row
from ..image_processing_nextflow import NextFlowImageProcessorPil
from ..processing_nextflow import NextFlowProcessor


class StageRows(Dataset):
    """Rows of the data format (docs/data.md) as a stage of the transformer takes them.

    Args:
        rows: by number.
        processor: of the model.
        level: resolution that pictures with codes must have; `None` for any.
        caption_share: share of the drawings that are turned round.
        empty_share: share of the rows answered by a picture alone whose prompt is left empty: the unconditional half
            of guidance. Both shares come to 1 at most, and which rows they take depends on `seed` and the number alone.

    Raises:
        ValueError: on access, for a row with codes of another level; the message names it.
    """

    def __init__(
        self,
        rows,
        processor: NextFlowProcessor,
        level: int | None = None,
        caption_share: float = 0.0,
        empty_share: float = 0.0,
        seed: int = 0,
    ):
        self.rows, self.processor, self.level = rows, processor, level
        self.caption_share, self.empty_share, self.seed = caption_share, empty_share, seed

    @property
    def settings(self) -> dict:
        """What beside the rows decides about the samples."""
        return {name: getattr(self, name) for name in ("level", "caption_share", "empty_share", "seed")}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        self._check_level(index, row)
        drawn = random.Random(f"{self.seed} {index}").random()
        if drawn < self.caption_share:
            return as_caption(row, self.processor.caption_request)
        return without_prompt(row) if drawn < self.caption_share + self.empty_share else row

    def _check_level(self, index: int, row: dict):
        if self.level is None:
            return
        schedules = self.processor.image_processor.scale_schedules
        num_scales = schedules.build(level=self.level).num_scales
        for grid in row.get("image_grids") or ():
            if self.processor.image_processor.schedule_for_grid(*grid).num_scales != num_scales:
                raise ValueError(
                    f"Row {index} has a picture of {grid[0]}x{grid[1]} cells, which is none of level {self.level}; "
                    f"extract its codes with --level {self.level}, or set the recipe's level to null."
                )


def as_caption(row: dict, request: str) -> dict:
    """A drawing turned round: the picture and `request`, answered by the prompt. Other rows are returned as they are.

    The picture is read with its own codes, not with those that self-correction drew.
    """
    asked = _asked_for_a_picture(row)
    if asked is None or [part["type"] for part in asked] != ["text"] or not asked[0].get("text"):
        return row
    turned = _with_turns(row, [*row["messages"][1]["content"], {"type": "text", "text": request}], asked)
    if row.get("image_labels") is not None:
        turned["image_tokens"] = row["image_labels"]
    return turned


def without_prompt(row: dict) -> dict:
    """A row that is answered by a picture alone with its texts left empty, pictures kept. Others as they are."""
    asked = _asked_for_a_picture(row)
    if asked is None:
        return row
    emptied = [part | {"text": ""} if part["type"] == "text" else part for part in asked]
    return _with_turns(row, emptied, row["messages"][1]["content"])


def _asked_for_a_picture(row: dict) -> list[dict] | None:
    """The user's parts in a row of one turn each that is answered by one picture; `None` for other rows.

    Rows that say what is trained on are left alone; a `null` of Arrow says nothing.
    """
    messages = row["messages"]
    if [message["role"] for message in messages] != ["user", "assistant"]:
        return None
    asked, drawn = (message["content"] for message in messages)
    asked = [{"type": "text", "text": asked}] if isinstance(asked, str) else asked
    if isinstance(drawn, str) or [part["type"] for part in drawn] != ["image"]:
        return None
    return None if any(part.get("train") is not None for part in (*messages, *asked, *drawn)) else asked


def _with_turns(row: dict, question: list[dict], answer: list[dict]) -> dict:
    return row | {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


class StagePictures(Dataset):
    """The pictures of rows as a stage of the vision tokenizer takes them: cut square, `level` pixels a side.

    An item has `pixel_values` (3, level, level) in [-1, 1].

    Raises:
        ValueError: if no row gives a picture.
    """

    def __init__(self, rows, root: Path, processor: NextFlowImageProcessorPil, level: int):
        processor.scale_schedules.for_size(level, level)  # raises for a size that is not drawn
        self.processor, self.level = processor, level
        samples = (read_row(row, root) for row in rows)
        self.pictures = [named for sample in samples for named in zip(sample.fields, sample.pictures)]
        if not self.pictures:
            raise ValueError(f"The rows in {root} give no pictures; a tokenizer is not trained on codes.")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        field, picture = self.pictures[index]
        image = self.processor.to_rgb(load_picture(picture, field))[0]
        square = ImageOps.fit(image, (self.level, self.level), Image.Resampling.BICUBIC)
        return {"pixel_values": self.processor(square, return_tensors="pt")["pixel_values"][0]}
