"""Encodes rows for training: token ids, labels, and images as codes or pixels. All rows that training refuses are
refused here.

The collator and the validation both read rows with these functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..image_processing_nextflow import NextFlowImageProcessor
from ..processing_nextflow import NextFlowProcessor
from ..scale_schedule import Grid, ScaleSchedules
from ..sequence.loss import IGNORE_INDEX
from .row_errors import BadImageError, BadRowError
from .rows import Sample, load_image, no_target_error
from .segments import encode_messages


@dataclass
class EncodedRow:
    """A row in the form that the model reads.

    Args:
        ids, labels: (L,) token ids, every image as `<boi>`, its slots, `<eoi>`, and the ids again or -100.
        grids: for each image its final grid (height, width) in cells.
        sample: the row that was read; it holds the codes.
        pixels: for each image of a row without codes its pixel values (3, H, W).
    """

    ids: list[int]
    labels: list[int]
    grids: list[Grid]
    sample: Sample
    pixels: list[np.ndarray]

    @property
    def num_trained(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    def check_learned(self):
        """Raises `BadRowError` if nothing is learned from it."""
        if not self.num_trained:
            raise no_target_error()


def encode_sample(
    sample: Sample,
    processor: NextFlowProcessor,
    codebook_size: int | None = None,
    fingerprint: str | None = None,
    max_positions: int | None = None,
) -> EncodedRow:
    """A row, encoded for a model with this processor.

    Args:
        codebook_size, fingerprint: those of the tokenizer from which codes must come; `None`: not checked.
        max_positions: how many positions the model has; `None`: not checked.

    Raises:
        BadRowError: naming the field, for images or texts that cannot be used, or that take too many positions.
    """
    image_processor = processor.image_processor
    grids, pixels = read_images(sample, image_processor, image_processor.scale_schedules, codebook_size, fingerprint)
    try:
        encoded = encode_messages(processor, sample.messages)
    except ValueError as error:
        raise BadRowError("messages", str(error)) from error
    remaining = list(grids)
    ids, labels, positions = [], [], len(encoded[0])
    for token, trained in zip(*encoded):
        tokens = answer = [token]
        if token == processor.image_token_id:
            if not remaining:
                raise BadRowError("messages", "the chat template writes more images than they hold")
            grid = remaining.pop(0)
            tokens = processor.image_placeholder_ids(*grid)
            # Slots that read the last scale predict nothing.
            schedule = image_processor.schedule_for_grid(*grid)
            positions += schedule.num_positions(processor.read_last_scale) - 1
            predicting = 1 + schedule.num_slots()
            answer = tokens[:predicting] + [IGNORE_INDEX] * (len(tokens) - predicting - 1) + tokens[-1:]
        ids += tokens
        labels += answer if trained else [IGNORE_INDEX] * len(tokens)
    if max_positions is not None and positions > max_positions:
        those = f"they take {positions} positions, but the model has {max_positions} (max_position_embeddings)"
        raise BadRowError("messages", f"{those}; shorten the texts, or give fewer images")
    # One label for each trained position, as trainers count them; nothing predicts the first token.
    return EncodedRow(ids, [IGNORE_INDEX, *labels[1:]], grids, sample, pixels)


def read_images(
    sample: Sample,
    image_processor: NextFlowImageProcessor,
    schedules: ScaleSchedules | None,
    codebook_size: int | None,
    fingerprint: str | None,
) -> tuple[list[Grid], list[np.ndarray]]:
    """Final grids of a row's images, and if it has no codes their pixel values. Codes are checked."""
    if sample.codes is None:
        return read_pixels(sample, image_processor)
    sample.codes.check(schedules, codebook_size, fingerprint)
    return sample.codes.grids, []


def read_pixels(sample: Sample, image_processor: NextFlowImageProcessor) -> tuple[list[Grid], list[np.ndarray]]:
    """The final grids (height, width) of a row's images, and their pixel values (3, H, W) in [-1, 1].

    Raises:
        BadImageError: naming the field, for an image that is missing, cannot be read, or whose aspect ratio no schedule
            has.
    """
    grids, pixels = [], []
    for place, source in zip(sample.fields, sample.images):
        image = load_image(source, place)
        check_ratio(image.height, image.width, place, image_processor.scale_schedules)
        try:
            batch = image_processor(image)
        except ValueError as error:
            raise BadImageError(place, str(error)) from error
        grids.append(tuple(batch["image_grids"][0].tolist()))
        pixels.append(batch["pixel_values"][0])
    return grids, pixels


def check_ratio(height: int, width: int, place: str, schedules: ScaleSchedules):
    """Raises `BadImageError` for an image whose aspect ratio no schedule has."""
    try:
        schedules.nearest(height, width)
    except ValueError as error:
        raise BadImageError(place, str(error)) from error
