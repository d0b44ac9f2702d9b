"""Images for OneCAT: input images to patches, images to the sizes that it draws, and decoded pixels to images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from transformers.processing_utils import Unpack

from ..image_processing_nextflow import NextFlowImageProcessor, NextFlowImageProcessorKwargs
from ..utils.atomic_files import atomic_save
from ..utils.short_repr import short_repr
from .schedules import TABLES, OneCatSchedules, checked_levels, schedules_of_levels


SIDES = tuple(grid[0] for grid in TABLES[1.0])
# Pixels per side of a token of an input image: two patches of 14.
UNIT = 28
# An input image has from 576 to 4,000 tokens, as far as whole tokens allow.
MIN_PIXELS, MAX_PIXELS = 576 * UNIT**2, 4000 * UNIT**2
MAX_ELONGATION = 200
# Means and deviations of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The size of the second view of an image in a chat.
THUMBNAIL = (448, 448)
# The shorter side of the input image of an edit, by the level at which the edited image is drawn.
REFERENCE_SIDES = {512: 672, 1024: 1008}


class OneCatImageProcessor(NextFlowImageProcessor):
    r"""[`NextFlowImageProcessor`] with OneCAT's schedules, and `read`, which prepares input images.

    Args:
        scales: sides of OneCAT's square grids.
        patch_size, levels: as in [`BitwiseVQConfig`].
    """

    save_pretrained = atomic_save(NextFlowImageProcessor.save_pretrained)

    def __init__(
        self,
        scales: Sequence[int] = SIDES,
        patch_size: int = 16,
        levels: Sequence[Sequence[int]] = ((512, 10), (1024, 13)),
        **kwargs: Unpack[NextFlowImageProcessorKwargs],
    ):
        if not isinstance(scales, Sequence) or tuple(scales) != SIDES:
            raise ValueError(f"OneCAT's square grids have the sides {list(SIDES)}, got {short_repr(scales)}.")
        super().__init__(scales, patch_size, levels, **kwargs)

    @property
    def scale_schedules(self) -> OneCatSchedules:
        return schedules_of_levels(self.patch_size, checked_levels(self.levels))

    def read(self, images, sizes: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """Images as the model reads them.

        Args:
            images: PIL images in RGB.
            sizes: height and width to which each is resized, multiples of 28.

        Returns:
            `pixel_values` (num_images, 3, H, W) float32, normalised, padded with 0 right and bottom, and `pixel_sizes`
            (num_images, 2) int64.
        """
        arrays = []
        for image, (height, width) in zip(images, sizes, strict=True):
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
            arrays.append(((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1))
        return {"pixel_values": np.stack(self.pad(arrays)), "pixel_sizes": np.array(sizes, dtype=np.int64)}


def size_of_chat(height: int, width: int) -> tuple[int, int]:
    """The size to which an image of a chat is resized: multiples of 28 near its own size, with 576 to 4,000 tokens.

    Raises:
        ValueError: for an image more elongated than 1:200.
    """
    _check_elongation(height, width)
    sides = [max(UNIT, round(side / UNIT) * UNIT) for side in (height, width)]
    if sides[0] * sides[1] > MAX_PIXELS:
        factor, whole = 1 / math.sqrt(height * width / MAX_PIXELS), math.floor
    elif sides[0] * sides[1] < MIN_PIXELS:
        factor, whole = math.sqrt(MIN_PIXELS / (height * width)), math.ceil
    else:
        return sides[0], sides[1]
    return tuple(max(UNIT, whole(side * factor / UNIT) * UNIT) for side in (height, width))


def size_of_reference(height: int, width: int, level: int) -> tuple[int, int]:
    """The size to which the input image of an edit is resized if the edited image is drawn at this level (a
    resolution).

    Raises:
        ValueError: for an image more elongated than 1:200.
    """
    _check_elongation(height, width)
    side = REFERENCE_SIDES[min(REFERENCE_SIDES, key=lambda known: abs(known - level))]
    ratio = height / width
    if width < height:
        return size_of_chat(int(side * ratio), side)
    return size_of_chat(side, int(side / ratio))


def num_tokens(size: tuple[int, int]) -> int:
    """How many tokens an input image of (height, width) pixels has."""
    return (size[0] // UNIT) * (size[1] // UNIT)


def _check_elongation(height: int, width: int):
    if max(height, width) > MAX_ELONGATION * min(height, width):
        raise ValueError(
            f"An image of {height}x{width} pixels is more elongated than 1:{MAX_ELONGATION}; crop it first."
        )
