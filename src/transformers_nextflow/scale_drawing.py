"""Pictures drawn side by side, scale by scale: their codes so far, and the slots that the next scale reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .sampling_nextflow import Generators, ImageSampling, draw_codes
from .scale_schedule import ScaleSchedule
from .sequence_layout import batch_slots


@dataclass
class ScaleState:
    """What a callback sees after each scale.

    `image_tokens` holds, for each picture, the codes (n,) so far; `preview()` decodes them.
    """

    model: nn.Module
    schedules: list[ScaleSchedule]
    image_tokens: list[torch.Tensor]
    logits: torch.Tensor

    def preview(self) -> list[torch.Tensor]:
        """Pictures, each (3, H, W) in [-1, 1], from the scales drawn so far."""
        vq_model = self.model.vq_model
        return [vq_model.decode(t[None], s)[0] for t, s in zip(self.image_tokens, self.schedules)]


class Drawing:
    """Pictures that are drawn side by side: the codes so far, and the slots that the next scale reads.

    Args:
        model: the [`NextFlowForConditionalGeneration`] that draws.
        schedules: one for each picture (B).
        sampling: its settings follow each picture's own number of scales, so that a picture does not depend on the
            sizes beside it.
        generator: one for all, or one for each picture.

    Attributes:
        image_tokens: (B, N) codes, -1 where none is drawn yet.
        guidance: of each scale; a number, or (B, 1, 1) where the pictures differ.
        last_guided_scale: counted from 0; -1 without guidance.

    Raises:
        ValueError: for generators that are not as many as the pictures.
    """

    def __init__(
        self, model: nn.Module, schedules: Sequence[ScaleSchedule], sampling: ImageSampling, generator: Generators
    ):
        if isinstance(generator, Sequence) and len(generator) != len(schedules):
            raise ValueError(
                f"{len(generator)} generators came with {len(schedules)} pictures; give one for all, or one for each."
            )
        self.model, self.schedules, self.sampling, self.generator = model, tuple(schedules), sampling, generator
        # Pictures of one size are handled at once; an index of all rows is a slice, which copies nothing.
        distinct, rows = set(schedules), range(len(schedules))
        self.groups: dict[ScaleSchedule, slice | list[int]] = {
            schedule: slice(None) if len(distinct) == 1 else [row for row in rows if schedules[row] == schedule]
            for schedule in sorted(distinct, key=schedules.index)
        }
        self.num_scales = max(schedule.num_scales for schedule in schedules)
        self.image_tokens = torch.full(
            (len(schedules), max(schedule.num_tokens for schedule in schedules)), -1, device=model.device
        )
        self._slots: dict[int, list] = {}
        self._scale_counts = torch.tensor([[schedule.num_scales] for schedule in schedules], device=model.device)
        guidance = [
            [sampling.guidance_at(scale, s.num_scales) if scale < s.num_scales else 1.0 for s in schedules]
            for scale in range(self.num_scales)
        ]
        self.last_guided_scale = max([scale for scale, values in enumerate(guidance) if set(values) != {1.0}] + [-1])
        self.guidance = [
            values[0] if len(set(values)) == 1 else torch.tensor(values, device=model.device)[:, None, None]
            for values in guidance
        ]

    def slots(self, scale: int, copies: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The slots of a scale, counted from 0, as [`CachedSequences.read_slots`] takes them: embeddings, coordinates,
        which are occupied. All pictures are repeated `copies` times, for guidance.

        Pictures with smaller grids, or done, have empty slots.
        """
        embedding, device = self.model.model.visual_embedding, self.image_tokens.device
        drawing = {schedule: rows for schedule, rows in self.groups.items() if scale < schedule.num_scales}
        features = [
            embedding.slot_features(self.image_tokens[rows], schedule, scale + 1) for schedule, rows in drawing.items()
        ]
        if len(self.groups) == 1:
            joined = features[0]
        else:
            longest = max(part.shape[1] for part in features)
            joined = features[0].new_zeros(len(self.schedules), longest, features[0].shape[-1])
            for rows, part in zip(drawing.values(), features):
                joined[rows, : part.shape[1]] = part
        embeds = embedding(joined, torch.tensor(scale + 1, device=device), self._scale_counts)
        if copies not in self._slots:
            self._slots[copies] = batch_slots(self.schedules * copies, self.model.config.rope_range)
        coordinates, occupied = self._slots[copies][scale]
        return (
            embeds.repeat(copies, 1, 1) if copies > 1 else embeds,
            coordinates.to(device),
            None if occupied is None else occupied.to(device),
        )

    def draw(self, scale: int, logits: torch.Tensor, given_image_tokens: torch.Tensor | None = None):
        """Draw the codes of a scale from logits (B, n, V), or take them from given ones where these reach so far."""
        for schedule, rows in self.groups.items():
            if scale < schedule.num_scales:
                start, stop = schedule.offsets[scale : scale + 2]
                if given_image_tokens is not None and stop <= given_image_tokens.shape[1]:
                    drawn = given_image_tokens[rows, start:stop]
                else:
                    options = self.sampling.drawing_at(scale, schedule.num_scales)
                    sources = self.generator
                    if isinstance(sources, Sequence) and isinstance(rows, list):
                        sources = [sources[row] for row in rows]
                    drawn = draw_codes(logits[rows, : stop - start], **options, generator=sources)
                self.image_tokens[rows, start:stop] = drawn

    def counts(self, scale: int) -> list[int]:
        """How many codes of each picture are drawn once `scale` is."""
        return [schedule.offsets[min(scale + 1, schedule.num_scales)] for schedule in self.schedules]

    def state(self, scale: int, logits: torch.Tensor) -> ScaleState:
        """What a callback sees after a scale."""
        tokens = [row[:count] for row, count in zip(self.image_tokens, self.counts(scale))]
        return ScaleState(self.model, list(self.schedules), tokens, logits)
