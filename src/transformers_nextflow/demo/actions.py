"""The actions of the demo, as functions of a pipeline that do not depend on a browser."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..utils.one_line_errors import USER_ERRORS, one_line


if TYPE_CHECKING:
    from ..pipeline_nextflow import NextFlowPipeline

logger = logging.getLogger(__name__)

# Images smaller than this are enlarged for painting, pixel by pixel, since a brush is too coarse for 64 pixels.
PAINTED_SIDE = 512
DEFAULT_SIZE = "default"


@dataclass
class DrawingState:
    """What the page shows of a drawing.

    Args:
        images: the images so far, each with its caption.
        growth: the first image after each scale, with the number of the scale.
        is_finished: whether the images are finished.
        warnings: warnings of the pipeline.
    """

    images: list[tuple[Image.Image, str]]
    growth: list[tuple[Image.Image, str]] = field(default_factory=list)
    is_finished: bool = False
    warnings: list[str] = field(default_factory=list)


def sizes(pipe: NextFlowPipeline) -> list[str]:
    """The sizes that a model draws, as "WIDTH x HEIGHT", smallest first."""
    schedules = pipe.processor.image_processor.scale_schedules
    every = sorted(set(schedules.all_sizes()), key=lambda size: (size[0] * size[1], size))
    return [DEFAULT_SIZE, *(f"{width} x {height}" for height, width in every)]


def draw(pipe: NextFlowPipeline, prompt: str, size: str, count, seed, guidance) -> Iterator[DrawingState]:
    """Draw candidates for a prompt and give them after each scale; finally, the one with the best score comes first.

    Args:
        prompt: the prompt of all candidates.
        size: one of `sizes`.
        count: number of candidates; candidate i has the seed `seed` + i.
        guidance: guidance scale; `None` for the checkpoint's own.

    Raises:
        ValueError: for inputs that the pipeline refuses.
    """
    if size not in sizes(pipe):
        raise ValueError(f"Images are not drawn in the size {size!r}; choose one of the list.")
    asked = {} if size == DEFAULT_SIZE else dict(zip(("width", "height"), map(int, size.split(" x "))))
    for shown in _stream_scales(pipe, prompt, count, seed, guidance_scale=guidance, **asked):
        if shown.is_finished and len(shown.images) > 1 and pipe.interleaves:
            images = [image for image, _ in shown.images]
            scores = pipe.score(images, [prompt] * len(images)).text_given_image.tolist()
            ranked = sorted(zip(shown.images, scores), key=lambda pair: -pair[1])
            shown.images = [(image, f"{caption}, score {score:.2f}") for (image, caption), score in ranked]
        yield shown


def edit(pipe: NextFlowPipeline, prompt: str, painted: dict | None, count, seed, guidance) -> Iterator[DrawingState]:
    """Edit an image as a prompt says, inside of the painted area, or everywhere if nothing was painted.

    Args:
        painted: "background", the image, and "layers", images with an alpha channel in which the user painted.

    Raises:
        ValueError: without an image, and for what the pipeline refuses.
    """
    if not painted or painted.get("background") is None:
        raise ValueError("There is no image to edit; upload one, or use one that was drawn.")
    image = shrunk(pipe, painted["background"])
    mask = mask_of(painted["layers"], image.size)
    regions = {} if mask is None else {"mask_image": mask, "paste_back": True}
    return _stream_scales(pipe, prompt, count, seed, image=image, guidance_scale=guidance, **regions)


def vary(pipe: NextFlowPipeline, prompt: str, image: Image.Image | None, kept, count, seed) -> Iterator[DrawingState]:
    """Draw variations of an image, with its first `kept` scales.

    Raises:
        ValueError: without an image, and for what the pipeline refuses.
    """
    if image is None:
        raise ValueError("There is no image to vary; upload one, or use one that was drawn.")
    return _stream_scales(pipe, prompt, count, seed, image=shrunk(pipe, image), num_kept_scales=_whole(kept, "kept"))


def chat(pipe: NextFlowPipeline, conversation: list[dict], text: str, images: list[Image.Image], seed) -> list[dict]:
    """A conversation with one more question, of text and images, and its answer.

    Raises:
        ValueError: for a question without words, and for inputs that the pipeline refuses.
    """
    if not text.strip():
        raise ValueError("The message is empty; write some text.")
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    asked = [*conversation, {"role": "user", "content": content}]
    drawing = {}
    if pipe.interleaves:
        drawing = {"generator": torch.Generator().manual_seed(_whole(seed, "seed"))}
    return [*asked, pipe.chat(asked, **drawing)]


def explain(error: Exception) -> str:
    """The message for an error; an unexpected error is also logged with its traceback."""
    if not isinstance(error, (*USER_ERRORS, MemoryError, torch.OutOfMemoryError)):
        logger.error("The demo failed.", exc_info=error)
    return one_line(error).removeprefix("Error: ")


def enlarged(image: Image.Image) -> Image.Image:
    """An image for painting: small images are enlarged by repeating pixels."""
    factor = max(1, PAINTED_SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def shrunk(pipe: NextFlowPipeline, image: Image.Image) -> Image.Image:
    """The inverse of `enlarged` for images of the model's sizes; any other image is only converted to RGB, with
    transparent pixels on white, as the pipeline reads it.
    """
    [image] = pipe.processor.image_processor.to_rgb([image])
    for height, width in pipe.processor.image_processor.scale_schedules.all_sizes():
        small = image.resize((width, height), Image.Resampling.NEAREST)
        again = enlarged(small)
        if again.size == image.size and np.array_equal(np.asarray(again), np.asarray(image)):
            return small
    return image


def mask_of(layers: list[Image.Image], size: tuple[int, int]) -> Image.Image | None:
    """The mask of the painted area, of an image's size (width, height); `None` if nothing was painted."""
    marked = [np.asarray(layer.convert("RGBA").getchannel("A")) > 0 for layer in layers]
    if not any(layer.any() for layer in marked):
        return None
    mask = Image.fromarray(255 * np.logical_or.reduce(marked).astype(np.uint8))
    # Masks of enlarged images are reduced: a pixel is marked if most of its enlarged square is.
    return mask.resize(size, Image.Resampling.BOX)


def _stream_scales(pipe: NextFlowPipeline, prompt: str, count, seed, **settings) -> Iterator[DrawingState]:
    """Call the pipeline in a thread, and yield the images after each scale; closing the iterator stops the drawing."""
    if not (prompt or "").strip():
        raise ValueError("There is no prompt; say what is to be drawn.")
    count, seed = _whole(count, "number of images"), _whole(seed, "seed")
    pipe.check_batch_size(count)  # before `count` generators are made
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    captions = [f"seed {seed + index}" for index in range(count)]
    updates, growth, is_closed = SimpleQueue(), [], threading.Event()

    def after_scale(pipe, step: int, scale: int, values: dict):
        growth.append((values["preview"][0], f"scale {scale + 1}"))
        updates.put(DrawingState(list(zip(values["preview"], captions)), list(growth)))
        pipe._interrupt = is_closed.is_set()

    def call():
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                images = pipe(
                    prompt, num_images_per_prompt=count, generator=generators, callback_on_step_end=after_scale,
                    callback_on_step_end_tensor_inputs=["preview"], **settings,
                ).images  # fmt: skip
            own = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
            updates.put(DrawingState(list(zip(images, captions)), growth, is_finished=True, warnings=own))
        except Exception as error:
            updates.put(error)

    threading.Thread(target=call, daemon=True).start()
    try:
        while True:
            shown = updates.get()
            if isinstance(shown, Exception):
                raise shown
            yield shown
            if shown.is_finished:
                return
    finally:
        is_closed.set()


def _whole(value, name: str) -> int:
    """Raises `ValueError` for values that are no whole numbers."""
    if value is None or not float(value).is_integer() or not 0 <= value <= 2**32:
        raise ValueError(f"The {name} must be a whole number from 0 to {2**32}, got {value}.")
    return int(value)
