"""The rows of a stage: some drawings turned into captions, some without their prompts, images of the stage's level."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ..data.row_codes import (
    CLEAN_TOKENS,
    GRIDS,
    LABELS,
    TOKENS,
    read_codes,
    read_grids,
    schedule_of,
)
from ..data.row_errors import BadImageError, BadRowError
from ..data.rows import NumberedRows, Sample, check_is_row, load_image, read_messages, read_row
from ..image_processing_nextflow import NextFlowImageProcessor
from ..processing_nextflow import NextFlowProcessor
from ..scale_schedule import most_frames


if TYPE_CHECKING:
    from datasets import IterableDataset


class StageRows(Dataset):
    """Rows of the data format (docs/data.md), changed for a stage of the transformer's training.

    Args:
        rows: rows that are read by number.
        processor: the processor of the model.
        level: resolution that images with codes must have; `None` for any.
        caption_share: share of the drawings that are turned into captions.
        empty_share: share of the rows answered by only an image whose prompt is left empty, for guidance. The two
            shares add up to 1 at most. Which rows they change depends only on `seed`, the number and the epoch, so in
            several epochs every row is also seen unchanged.

    Raises:
        ValueError: on access, for a row with codes of another level, or an invalid row; the message names it.
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
        self.caption_share, self.empty_share, self.seed, self.epoch = caption_share, empty_share, seed, 0

    @property
    def settings(self) -> dict:
        """The settings, besides the rows, on which samples depend."""
        return {name: getattr(self, name) for name in ("level", "caption_share", "empty_share", "seed")}

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        return self.stage_row(self.rows[index], index)

    def stream(self) -> IterableDataset:
        """The same changes for rows that are a stream of `datasets`."""
        return self.rows.map(self.stage_row, with_indices=True)

    def stage_row(self, row: dict, index: int | str) -> dict:
        """A row, changed for the stage; `index` is its number or name."""
        check_is_row(row)
        self._check_level(index, row)
        drawn = random.Random(f"{self.seed} {index}" + (f" {self.epoch}" if self.epoch else "")).random()
        if drawn < self.caption_share:
            return as_caption(row, self.processor.caption_request)
        return without_prompt(row) if drawn < self.caption_share + self.empty_share else row

    def _check_level(self, index: int | str, row: dict):
        if self.level is None:
            return
        schedules = self.processor.image_processor.scale_schedules
        num_scales = schedules.build(level=self.level).num_scales
        for place, grid in enumerate(read_grids(row)):
            if schedule_of(schedules, grid, f"{GRIDS}[{place}]").num_scales != num_scales:
                raise ValueError(
                    f"Row {index} has an image of {grid[0]}x{grid[1]} cells, which is none of level {self.level}; "
                    f"extract its codes with --level {self.level}, or set the recipe's level to null."
                )


def as_caption(row: dict, request: str) -> dict:
    """A drawing turned into a caption: the image and `request`, answered by the prompt. Other rows are unchanged.

    The image is read with its clean codes, since it is not trained on.

    Raises:
        BadRowError: for codes sampled for self-correction without clean ones, and for an invalid row.
    """
    turns = prompt_and_image(row)
    if turns is None or [part["type"] for part in turns[0]] != ["text"] or not turns[0][0]["text"]:
        return row
    turned = _with_turns(row, [*turns[1], {"type": "text", "text": request}], turns[0])
    codes = read_codes(turned, trained=[False])
    if codes is None:
        return turned
    return turned | {TOKENS: [image.tolist() for image in codes.read], LABELS: None, CLEAN_TOKENS: None}


def without_prompt(row: dict) -> dict:
    """A row that only an image answers, with empty texts and its input images. Other rows are unchanged."""
    turns = prompt_and_image(row)
    if turns is None:
        return row
    emptied = [part | {"text": ""} if part["type"] == "text" else part for part in turns[0]]
    return _with_turns(row, emptied, turns[1])


def prompt_and_image(row: dict) -> tuple[list[dict], list[dict]] | None:
    """The parts of the user and of the answer, in a row with one turn each that one image answers; `None` for others.

    Rows with `train` flags count as others.
    """
    messages = read_messages(row)
    if [message["role"] for message in messages] != ["user", "assistant"]:
        return None
    asked, drawn = (message["content"] for message in messages)
    flagged = any("train" in holder for holder in (*messages, *asked, *drawn))
    return None if flagged or [part["type"] for part in drawn] != ["image"] else (asked, drawn)


def _with_turns(row: dict, question: list[dict], answer: list[dict]) -> dict:
    return row | {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


class StageImages(Dataset):
    """The images of rows for a stage of the vision tokenizer: cropped to squares of `level` pixels a side.

    An item has `pixel_values` (3, level, level) in [-1, 1].

    Raises:
        ValueError: if no row gives an image.
    """

    def __init__(self, rows, root: Path, processor: NextFlowImageProcessor, level: int):
        processor.scale_schedules.for_size(level, level)  # raises for a size that is not drawn
        self.processor, self.level, self.rows, self.root = processor, level, NumberedRows(rows), root
        # Row, number in it, field and path of each image; images inside of rows may be too large to keep in memory.
        self.images: list[tuple[int, int, str, Path | None]] = []
        for number in range(len(rows)):
            sample = self._read(number)
            for position, (place, own) in enumerate(zip(sample.fields, sample.images)):
                self.images.append((number, position, place, own if isinstance(own, Path) else None))
        if not self.images:
            raise ValueError(f"The rows in {root} give no images; a tokenizer is not trained on codes.")

    def __len__(self) -> int:
        return len(self.images)

    def _read(self, number: int) -> Sample:
        row = self.rows[number]
        try:
            return read_row(row, self.root, max_frames=most_frames(self.level))
        except BadRowError as error:
            raise error.of_row(number) from error

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.processor(self.square(index, self.level), return_tensors="pt")["pixel_values"][0]}

    def square(self, index: int, side: int) -> Image.Image:
        """An image, cropped to a square and resized to `side` pixels."""
        number, position, field, source = self.images[index]
        place = f"row {number}, {field}"
        loaded = load_image(self._read(number).images[position] if source is None else source, place)
        try:
            image = self.processor.to_rgb(loaded)[0]
        except ValueError as error:
            raise BadImageError(place, str(error)) from error
        return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
