"""What a call is given, checked: prompts with their images, masks and sizes in one form, options, and scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from ..processing_nextflow import NextFlowProcessor, check_prompts
from ..scale_schedule import ScaleSchedule
from ..utils.known_names import check_function
from ..utils.short_repr import short_repr
from ..utils.typed_values import check_types, is_of_type


ImageInput = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike | bytes | BinaryIO


@dataclass(frozen=True)
class ImageRequest:
    """A batch of images to draw; all lists have the same length.

    Args:
        prompts, negative_prompts: texts.
        schedules: schedules of the images to draw.
        images: for each prompt the images that it refers to, RGB; `None` if no prompt has any.
        pixels: for each prompt the image (3, H, W) in [-1, 1] that is partly kept; `None` if nothing is kept.
        regions: for each prompt the region of that image to draw, (H, W) bool; `None` for the whole image.
        num_kept_scales: how many of the first scales of that image are kept; `None` for none.
    """

    prompts: list[str]
    negative_prompts: list[str]
    schedules: list[ScaleSchedule]
    images: list[list[Image.Image]] | None = None
    pixels: list[torch.Tensor] | None = None
    regions: list[torch.Tensor] | None = None
    num_kept_scales: int | None = None

    @classmethod
    def build(
        cls,
        processor: NextFlowProcessor,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None,
        image: ImageInput | list | None,
        mask_image: ImageInput | list | None,
        size: tuple[int | None, int | None],
        num_kept_scales: int | None,
        think: bool,
        paste_back: bool,
    ) -> ImageRequest:
        """A request from the arguments of a pipeline's call, which are described there.

        Raises:
            ValueError: for inputs that do not fit together.
        """
        prompts = check_prompts(prompt)
        if negative_prompt is None or isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt or ""] * len(prompts)
        negative_prompt = check_prompts(negative_prompt, allow_empty=True)
        if len(negative_prompt) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts came with {len(negative_prompt)} negative ones; give one for each."
            )
        images = None if image is None else _images_of_prompts(processor, image, prompt)
        keeps = mask_image is not None or num_kept_scales is not None
        _check_combination(processor, images, keeps, mask_image, think, paste_back)
        last_images = None if images is None else [row[-1] for row in images]
        schedules = [
            requested_schedule(processor, size, None if last_images is None else last_images[n])
            for n in range(len(prompts))
        ]
        pixels, regions = None, None
        if keeps:
            pixels = pixels_of_size(processor, last_images, schedules)
        if mask_image is not None:
            regions = _regions(processor, mask_image, last_images, prompt)
        if num_kept_scales is not None:
            least = min(schedule.num_scales for schedule in schedules)
            if not is_of_type(num_kept_scales, int) or not 0 < num_kept_scales <= least:
                raise ValueError(
                    f"num_kept_scales must be from 1 to the {least} scales, got {short_repr(num_kept_scales)}."
                )
            # What is kept stands in the image that is drawn; the prompt is one for the image as a whole.
            images = None
        return cls(prompts, list(negative_prompt), schedules, images, pixels, regions, num_kept_scales)

    def repeat(self, count: int) -> ImageRequest:
        """Each entry `count` times, one after the other."""
        return self.select([index for index in range(len(self.prompts)) for _ in range(count)])

    def select(self, indices: Sequence[int]) -> ImageRequest:
        """The entries at `indices`."""
        lists = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), list)}
        return replace(self, **{name: [values[index] for index in indices] for name, values in lists.items()})


def _images_of_prompts(processor: NextFlowProcessor, image, prompt) -> list[list[Image.Image]]:
    if isinstance(prompt, list | tuple):
        if not _is_several(image) or len(image) != len(prompt):
            count = len(image) if _is_several(image) else 1
            raise ValueError(
                f"{len(prompt)} prompts came with {count} images; give a list with one image, or one list of "
                "images, for each prompt."
            )
        rows = [list(row) if _is_several(row) else [row] for row in image]
    else:
        rows = [list(image) if _is_several(image) else [image]]
    if not all(rows):
        raise ValueError("A prompt came with an empty list of images; leave image out, or give every prompt one.")
    if any(_is_several(single) for row in rows for single in row):
        raise ValueError(
            f"{len(rows)} prompts came with lists of images in lists; give each prompt one image, or one list of them."
        )
    return [processor.image_processor.to_rgb(row) for row in rows]


def _is_several(images) -> bool:
    """Whether `images` is a list of images, or an array or a tensor of several."""
    return isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4


def _check_combination(processor, images, keeps: bool, mask_image, think: bool, paste_back: bool):
    if keeps and (images is None or any(len(row) != 1 for row in images)):
        raise ValueError(
            "mask_image and num_kept_scales keep a part of an image; give image= with one for each prompt."
        )
    if paste_back and mask_image is None:
        raise ValueError("paste_back puts pixels back outside of a mask; give mask_image.")
    if think and processor.think_prefix is None:
        raise ValueError("This checkpoint was not trained to think before it draws; leave think out.")
    if think and keeps:
        raise ValueError("think cannot be combined with mask_image or num_kept_scales; leave one of them out.")


def requested_schedule(processor, size: tuple[int | None, int | None], image: Image.Image | None) -> ScaleSchedule:
    """The schedule of the requested size. A side that is `None` is that of the image as the processor resizes it, or of
    the model's largest square.

    Raises:
        ValueError: for a size that no schedule has.
    """
    for name, value in zip(("height", "width"), size):
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a whole number of pixels, got {short_repr(value)}.")
    image_processor = processor.image_processor
    schedules = image_processor.scale_schedules
    if image is not None:
        default = image_processor.schedule_of(image.height, image.width).image_size(image_processor.patch_size)
    else:
        default = (schedules.resolutions[-1],) * 2
    height, width = (own if asked is None else asked for asked, own in zip(size, default))
    return schedules.for_size(height, width)


def pixels_of_size(processor, images: list[Image.Image], schedules: list[ScaleSchedule]) -> list[torch.Tensor]:
    """Images as the model reads them, each (3, H, W) in [-1, 1].

    Raises:
        ValueError: if a schedule does not have the size of its image.
    """
    inputs = processor.image_processor(images, return_tensors="pt")
    pixels = []
    for index, (values, grid, schedule) in enumerate(zip(inputs["pixel_values"], inputs["image_grids"], schedules)):
        if tuple(grid.tolist()) != schedule.final_grid:
            raise ValueError(f"Image {index} is kept, so its size cannot change; leave height and width out.")
        height, width = schedule.image_size(processor.image_processor.patch_size)
        pixels.append(values[:, :height, :width])
    return pixels


def _regions(processor, mask_image, images: list[Image.Image], prompt) -> list[torch.Tensor]:
    masks = list(mask_image) if _is_several(mask_image) else [mask_image]
    if len(masks) != len(images) or (isinstance(prompt, list | tuple) and not _is_several(mask_image)):
        raise ValueError(f"{len(images)} prompts came with {len(masks)} masks; give a list with one for each.")
    preprocess = processor.image_processor.preprocess_mask
    return [torch.from_numpy(preprocess(mask, image)) for mask, image in zip(masks, images)]


def check_options(think: bool, max_thought_tokens: int, thought_temperature: float, flags: dict, **called):
    """Raises `ValueError` for functions that are none, for `flags` and for `think` that are neither true nor false, and
    for settings of a thought without one.
    """
    flags = flags | {"think": think}
    given = flags | {"max_thought_tokens": max_thought_tokens}
    check_types(given, dict.fromkeys(flags, bool) | {"max_thought_tokens": int}, "NextFlowPipeline")
    if max_thought_tokens < 0:
        raise ValueError(f"max_thought_tokens must be at least 0, got {max_thought_tokens}.")
    if not is_of_type(thought_temperature, float) or not 0 <= thought_temperature < float("inf"):
        raise ValueError(f"thought_temperature must be a number from 0, got {short_repr(thought_temperature)}.")
    if thought_temperature and not think:
        raise ValueError(
            f"thought_temperature={thought_temperature} is only for thoughts; add think, or leave it at 0."
        )
    for name, function in called.items():
        if function is not None:
            check_function(function, 4, name)


def checked_scores(scores: Sequence[float] | torch.Tensor, count: int) -> torch.Tensor:
    """Raises `ValueError` for anything but a finite number for each candidate."""
    try:
        checked = torch.as_tensor(scores, dtype=torch.float32).flatten()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"candidate_scorer must give a number for each candidate, got {short_repr(scores)}."
        ) from error
    if len(checked) != count or not bool(checked.isfinite().all()):
        raise ValueError(f"candidate_scorer must give {count} finite numbers, got {short_repr(scores)}.")
    return checked
