"""The rows of a stage: some drawings turned into captions, some without their prompts, images of the stage's level."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset

from ..data.row_codes import GRIDS, read_grids, schedule_of
from ..data.row_errors import BadImageError, BadRowError, number_in_stream
from ..data.rows import ROW_NUMBER, NumberedRows, Sample, check_is_row, load_image, read_row
from ..data.stored_sizes import rows_of_sizes
from ..data.views import AS_CAPTION, UNCHANGED, WITHOUT_PROMPT, apply_view, sizes_of_view
from ..image_processing_nextflow import NextFlowImageProcessor
from ..processing_nextflow import NextFlowProcessor
from ..scale_schedule import max_frames_of_level
from ..utils.image_files import open_image


if TYPE_CHECKING:
    from datasets import IterableDataset


# Orientations of files whose height is the width of what is stored.
ROTATED_ORIENTATIONS = {5, 6, 7, 8}


class StageRows(Dataset):
    """Rows of the data format (docs/data.md), changed for a stage of the transformer's training.

    Args:
        rows: rows that are read by number.
        processor: the processor of the model.
        level: resolution that images with codes must have; `None` for any.
        caption_share: share of the drawings that are turned into captions.
        empty_share: share of the rows answered by only an image whose prompt is left empty, for guidance. The two
            shares add up to 1 at most. Which rows they change depends only on `seed`, the number and the epoch, so in
            several epochs every row is also seen unchanged; those of a `stream` are the same in every epoch.

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
        """The same rows where they are a stream of `datasets`, each with its number, see `number_in_stream`."""
        return self.rows.map(self._numbered, with_indices=True)

    def _numbered(self, row: dict, index: int) -> dict:
        number = number_in_stream(index)
        try:
            return self.stage_row(row, number) | {ROW_NUMBER: number}
        except BadRowError as error:
            raise error.of_row(number) from error

    def stage_row(self, row: dict, index: int | str) -> dict:
        """A row, changed for the stage; `index` is its number or name."""
        check_is_row(row)
        self._check_level(index, row)
        return apply_view(row, self._view(index), self.processor.caption_request)

    def in_largest_views(self) -> list[StageRows]:
        """The rows in each of the views that may be the largest in some epoch: all unchanged, and all as captions if
        some are. An empty prompt is never longer.
        """
        shares = (0.0, 1.0) if self.caption_share else (0.0,)
        return [StageRows(self.rows, self.processor, self.level, share, seed=self.seed) for share in shares]

    def rows_of_sizes(self) -> Iterator[dict] | None:
        """What is stored of the sizes of the rows as the stage takes them, see `rows_of_sizes` of `data`."""
        stored = rows_of_sizes(self.rows)
        return None if stored is None else itertools.starmap(self._sizes, enumerate(stored))

    def _sizes(self, index: int, row: dict) -> dict:
        self._check_level(index, row)
        return sizes_of_view(row, self._view(index))

    def _view(self, index: int | str) -> int:
        uniform = random.Random(f"{self.seed} {index}" + (f" {self.epoch}" if self.epoch else "")).random()
        if uniform < self.caption_share:
            return AS_CAPTION
        return WITHOUT_PROMPT if uniform < self.caption_share + self.empty_share else UNCHANGED

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
            raise ValueError(f"The rows in {root} hold no images; a tokenizer is not trained on codes.")

    def __len__(self) -> int:
        return len(self.images)

    def _read(self, number: int) -> Sample:
        row = self.rows[number]
        try:
            return read_row(row, self.root, max_frames=max_frames_of_level(self.level))
        except BadRowError as error:
            raise error.of_row(number) from error

    def place(self, index: int) -> str:
        """Where an image stands, for messages of errors."""
        return f"row {self.images[index][0]}, {self.images[index][2]}"

    def source(self, index: int):
        """What the row gives of an image."""
        number, position, _, path = self.images[index]
        return self._read(number).images[position] if path is None else path

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.processor(self.square(index, self.level), return_tensors="pt")["pixel_values"][0]}

    def square(self, index: int, side: int) -> Image.Image:
        """An image cut square, brought to `side` pixels."""
        loaded = load_image(self.source(index), self.place(index))
        try:
            image = self.processor.to_rgb(loaded)[0]
        except ValueError as error:
            raise BadImageError(self.place(index), str(error)) from error
        return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


class BucketedImages(StageImages):
    """The images of rows at one or several levels, cut square or at their own ratios.

    An item has `pixel_values` (3, H, W) in [-1, 1]. Sizes of files are read here, the images when they are asked for.

    Args:
        levels: each image comes at one of them; which one follows from `seed` and its number.
        cut_square: else an image is brought to the size of the nearest ratio, as a model reads it.

    Raises:
        ValueError: if no row gives an image; for a level that is not drawn, and without `cut_square` for an image that
            cannot be opened, or of a ratio that is not drawn.
    """

    def __init__(self, rows, root: Path, processor: NextFlowImageProcessor, levels, cut_square: bool, seed: int = 0):
        for level in levels:
            processor.scale_schedules.build(level=level)  # raises if there is no such level
        super().__init__(rows, root, processor, max(levels))
        self.cut_square = cut_square
        self.levels = [random.Random(f"{seed} {index}").choice(levels) for index in range(len(self))]
        # Of each image height and width in pixels.
        self.sizes = [self._size(index) for index in range(len(self))]

    @property
    def settings(self) -> dict:
        """What beside the rows decides about the images."""
        return {"levels": sorted(set(self.levels)), "cut_square": self.cut_square}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.cut_square:
            image = self.square(index, self.levels[index])
        else:
            image = load_image(self.source(index), self.place(index))
        try:
            processed = self.processor.preprocess(image, level=self.levels[index], return_tensors="pt")
        except ValueError as error:
            raise BadImageError(self.place(index), str(error)) from error
        return {"pixel_values": processed["pixel_values"][0]}

    def _size(self, index: int) -> tuple[int, int]:
        level = self.levels[index]
        if self.cut_square:
            return level, level
        image = self.source(index)
        try:
            if not isinstance(image, Image.Image):
                image = open_image(io.BytesIO(image) if isinstance(image, bytes) else image)
            height, width = image.height, image.width
            # Pillow turns TIFFs itself.
            if image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in ROTATED_ORIENTATIONS:
                height, width = width, height
            schedule = self.processor.scale_schedules.nearest(height, width, level)
        except ValueError as error:
            raise BadImageError(self.place(index), str(error)) from error
        return schedule.image_size(self.processor.patch_size)
