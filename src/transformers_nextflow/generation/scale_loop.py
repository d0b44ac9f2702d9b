"""The scale loop: images are drawn side by side, a grid of codes in each pass (paper, section 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..scale_schedule import ScaleSchedule
from ..sequence.layout import batch_slots
from ..sequence.padding import pad_codes
from ..utils.known_names import check_function
from ..utils.typed_values import check_types
from .cached_sequences import CachedSequences
from .region_editing import KeptRegion
from .sampling import Generators, ImageSampling, check_generators, guide_over_contexts, sample_codes


@dataclass
class ScaleState:
    """The state after a scale, which callbacks get.

    `image_tokens` holds, for each image, the codes (n,) so far; `preview()` decodes them.
    """

    model: nn.Module
    schedules: list[ScaleSchedule]
    image_tokens: list[torch.Tensor]
    logits: torch.Tensor

    @property
    def is_finished(self) -> bool:
        """Whether all scales of every image are drawn."""
        return all(len(tokens) == s.num_tokens for tokens, s in zip(self.image_tokens, self.schedules))

    def preview(self) -> list[torch.Tensor]:
        """Images, each (3, H, W) in [-1, 1], from the scales drawn so far."""
        grids = torch.tensor([schedule.final_grid for schedule in self.schedules])
        return self.model.decode_image_tokens(pad_codes(self.image_tokens), grids)


ScaleCallback = Callable[[nn.Module, int, ScaleState], bool | None]


@dataclass
class ImageGenerationOutput(ModelOutput):
    """Images as codes.

    Args:
        image_tokens: (B, N) codes, padded with -1 if images differ in size or were stopped early.
        image_grids: (B, 2) final grids.
    """

    image_tokens: torch.LongTensor | None = None
    image_grids: torch.LongTensor | None = None


class ImageCodes:
    """Images that are drawn side by side: the codes so far, and the slots that the next scale reads.

    Args:
        model: the [`NextFlowForConditionalGeneration`] that draws.
        schedules: one for each image (B).
        sampling: settings of sampling, which follow each image's own number of scales, so an image does not depend on
            the sizes beside it.
        generator: one for all, or one for each image.
        given_image_tokens: (B, n) codes of the first scales, which are kept and not sampled; padded with -1 if an image
            has fewer of them.
        region: images that are kept outside of a region.

    Attributes:
        image_tokens: (B, N) codes, -1 where none is drawn yet.
        guidance: for each scale two strengths in the order of the contexts (text, image); each a number, or (B, 1, 1)
            if the images differ.
        last_guided_scale: counted from 0; -1 without guidance.
        rounds: the settings for each round in which a scale is sampled; NextFlow has one round.

    Raises:
        ValueError: for generators that are none, or whose number differs from that of the images; for given codes that
            are invalid or do not fill whole scales.
    """

    def __init__(
        self,
        model: nn.Module,
        schedules: Sequence[ScaleSchedule],
        sampling: ImageSampling,
        generator: Generators = None,
        given_image_tokens: torch.Tensor | None = None,
        region: KeptRegion | None = None,
    ):
        check_generators(generator, len(schedules))
        self.model, self.schedules, self.sampling, self.generator = model, tuple(schedules), sampling, generator
        self.rounds = [sampling]
        self.region, device = region, model.device
        # Images of one size are handled together; if these are all rows, their index is a slice, which copies nothing.
        distinct, rows = set(schedules), range(len(schedules))
        self.groups: dict[ScaleSchedule, slice | list[int]] = {
            schedule: slice(None) if len(distinct) == 1 else [row for row in rows if schedules[row] == schedule]
            for schedule in sorted(distinct, key=schedules.index)
        }
        self.num_scales = max(schedule.num_scales for schedule in schedules)
        self.image_tokens = torch.full(
            (len(schedules), max(schedule.num_tokens for schedule in schedules)), -1, device=device
        )
        self._num_given = self._store_given(given_image_tokens)
        self._scale_counts = torch.tensor([[schedule.num_scales] for schedule in schedules], device=device)
        self._scale_numbers = torch.arange(self.num_scales + 2, device=device).unbind()
        self.guidance = [
            tuple(self._guidance_per_image(part, scale) for part in sampling.guided_parts)
            for scale in range(self.num_scales)
        ]
        guided = [any(torch.is_tensor(part) or part != 1 for part in parts) for parts in self.guidance]
        self.last_guided_scale = max((scale for scale, is_guided in enumerate(guided) if is_guided), default=-1)

    @cached_property
    def _slots(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        slots, device = batch_slots(self.schedules, self.model.config.rope_range), self.image_tokens.device
        return [tuple(None if part is None else part.to(device) for part in scale) for scale in slots]

    def _store_given(self, given: torch.Tensor | None) -> list[int]:
        """Store given codes; returns how many each image has."""
        if given is None:
            return [0] * len(self.schedules)
        if len(given) != len(self.schedules):
            raise ValueError(f"{len(self.schedules)} prompts came with {len(given)} rows of given_image_tokens.")
        size = self.model.config.vq_config.codebook_size
        if not bool(((given >= -1) & (given < size)).all()):
            raise ValueError(
                f"given_image_tokens go from {int(given.min())} to {int(given.max())}; codes are below {size}, and -1 "
                "is padding."
            )
        counts = (given >= 0).sum(1).tolist()
        for row, (count, schedule) in enumerate(zip(counts, self.schedules)):
            if count not in schedule.offsets or bool((given[row, :count] < 0).any()):
                raise ValueError(
                    f"given_image_tokens of image {row} hold {count} codes, which do not fill its first scales: "
                    f"complete scales end at {', '.join(map(str, schedule.offsets[1:]))}."
                )
        width = max(counts)
        self.image_tokens[:, :width] = given[:, :width].to(self.image_tokens)
        return counts

    def _guidance_per_image(self, part: str, scale: int) -> float | torch.Tensor:
        values = [
            self.sampling.guidance_at(scale, schedule.num_scales, part) if scale < schedule.num_scales else 1.0
            for schedule in self.groups
        ]
        if len(set(values)) == 1:
            return values[0]
        of_schedule = dict(zip(self.groups, values))
        values = [of_schedule[schedule] for schedule in self.schedules]
        return torch.tensor(values, device=self.model.device)[:, None, None]

    def num_rounds(self, scale: int) -> int:
        """How often a scale is sampled; the first scale only once, since it has no slots that could read its codes."""
        return len(self.rounds) if scale > 0 else 1

    def slots(self, scale: int, round_: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The slots of a scale, counted from 0, as [`CachedSequences.read_slots`] takes them: embeddings, coordinates,
        and which are occupied. Images with smaller grids, and finished images, have empty slots.
        """
        drawing = {schedule: rows for schedule, rows in self.groups.items() if scale < schedule.num_scales}
        return self._embed(drawing, dict.fromkeys(drawing, scale + 1), self._slots[scale])

    def last_slots(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The slots that read the last scale of every image, in the form of `slots`."""
        return self._embed(self.groups, {s: s.num_scales + 1 for s in self.groups}, self._slots[self.num_scales])

    def _embed(self, groups, scale_numbers, slots):
        embedding, (coordinates, occupied) = self.model.model.visual_embedding, slots
        if len(self.groups) == 1:
            ((schedule, number),) = scale_numbers.items()
            joined = embedding.slot_features(self.image_tokens, schedule, number)
            scale_ids = self._scale_numbers[number]
        else:
            features = [
                embedding.slot_features(self.image_tokens[rows], schedule, scale_numbers[schedule])
                for schedule, rows in groups.items()
            ]
            joined = features[0].new_zeros(*coordinates.shape[2:], features[0].shape[-1])
            scale_ids = torch.zeros_like(self._scale_counts)
            for (schedule, rows), part in zip(groups.items(), features):
                joined[rows, : part.shape[1]] = part
                scale_ids[rows] = scale_numbers[schedule]
        return embedding(joined, scale_ids, self._scale_counts), coordinates, occupied

    def sample(self, scale: int, logits: torch.Tensor, round_: int = 0):
        """Sample the codes of a scale from logits (B, n, V), for the images whose codes of this scale are not given."""
        for schedule, rows in self.groups.items():
            if scale < schedule.num_scales:
                start, stop = schedule.offsets[scale : scale + 2]
                rows = self._without_given(rows, stop)
                if rows:
                    own = logits if rows == slice(None) else logits[rows, : stop - start]
                    self.image_tokens[rows, start:stop] = self._sample(scale, own, rows, schedule, self.rounds[round_])

    def _without_given(self, rows: slice | list[int], stop: int) -> slice | list[int]:
        """The rows of a group whose codes up to `stop` are not all given."""
        if not any(self._num_given):
            return rows
        members = range(len(self.schedules)) if isinstance(rows, slice) else rows
        missing = [row for row in members if self._num_given[row] < stop]
        return rows if len(missing) == len(members) else missing

    def _sample(self, scale: int, logits: torch.Tensor, rows, schedule: ScaleSchedule, sampling: ImageSampling):
        if self.region is not None:
            codes_before = self.image_tokens[rows, : schedule.offsets[scale]]
            logits = self.region.condition(logits, codes_before, rows, schedule)
        sources = self.generator
        if isinstance(sources, Sequence) and isinstance(rows, list):
            sources = [sources[row] for row in rows]
        codes = self._sample_codes(logits, **sampling.drawing_at(scale, schedule.num_scales), generator=sources)
        if self.region is not None:
            codes = self.region.keep_outside(codes, codes_before, rows, schedule)
        return codes

    def _sample_codes(self, logits: torch.Tensor, **options) -> torch.Tensor:
        """Codes (B, n), sampled from logits by `sample_codes`."""
        return sample_codes(logits, **options)

    def counts(self, scale: int) -> list[int]:
        """How many codes each image has after `scale`."""
        return [schedule.offsets[min(scale + 1, schedule.num_scales)] for schedule in self.schedules]

    def generated(self, num_scales: int) -> ImageGenerationOutput:
        """The images after `num_scales` scales."""
        grids = torch.tensor([schedule.final_grid for schedule in self.schedules], device=self.image_tokens.device)
        return ImageGenerationOutput(self.image_tokens[:, : max(self.counts(num_scales - 1))], grids)

    def state(self, scale: int, logits: torch.Tensor) -> ScaleState:
        """The state for callbacks after a scale."""
        tokens = [row[:count] for row, count in zip(self.image_tokens, self.counts(scale))]
        return ScaleState(self.model, list(self.schedules), tokens, logits)


def check_drawing(sampling: ImageSampling | None, callback: ScaleCallback | None):
    """Raises `ValueError` for what are no settings, and for what cannot be called after each scale."""
    check_types({"sampling": sampling}, {"sampling": ImageSampling | None}, "generate_images")
    if callback is not None:
        check_function(callback, 3, "callback")


class EagerScales:
    """The scales of images (B), read uncompiled by the rows `rows` (C, B) of `sequences`."""

    def __init__(self, drawing: ImageCodes, sequences: CachedSequences, rows: torch.Tensor):
        self.drawing, self.sequences, self.rows = drawing, sequences, rows
        self.origins = sequences.slot_origins(rows)

    def read(self, scale: int, round_: int = 0) -> torch.Tensor:
        """Hidden states (C, B, n, D) of the slots of a scale, counted from 0."""
        embeds, coordinates, occupied = self.drawing.slots(scale, round_)
        read = self.sequences.read_slots if round_ == 0 else self.sequences.read_slots_again
        return read(embeds, self.origins + coordinates, occupied, self.rows)

    def drop_contexts(self):
        """Continue without the rows that only guidance needs."""
        self.sequences.keep(self.rows[0])
        self.rows = torch.arange(self.rows.shape[1], device=self.rows.device)[None]
        self.origins = self.origins[:, :1]


def draw_scales(
    model: nn.Module,
    drawing: ImageCodes,
    sequences: CachedSequences,
    hidden_states: torch.Tensor,
    rows: torch.Tensor,
    callback: ScaleCallback | None = None,
    continues: bool = True,
) -> int:
    """Draw images (B) after the tokens that `sequences` have read.

    Args:
        hidden_states: (C, B, 1, D) of the tokens that open the images, under each context that guidance compares.
        rows: (C, B) int64, the rows of `sequences` to which they belong.
        callback: `callback(model, scale, state)` after each scale, counted from 0; `False` stops the drawing.
        continues: whether anything is read afterwards. If not, rows that only guidance needs leave the cache after the
            last guided scale, and the scales may be compiled ones.

    Returns:
        The number of scales drawn; fewer than all if the callback stopped the drawing.
    """
    compiled = None if continues else getattr(model, "compiled_drawing", None)
    with nullcontext() if compiled is None else compiled.scales(drawing, sequences, rows) as recorded:
        scales = recorded or EagerScales(drawing, sequences, rows)
        for scale in range(drawing.num_scales):
            for round_ in range(drawing.num_rounds(scale)):
                if scale > 0:
                    hidden_states = scales.read(scale, round_)
                logits = guide_over_contexts(model.visual_head(hidden_states).float(), drawing.guidance[scale])
                drawing.sample(scale, logits, round_)
            if callback is not None and callback(model, scale, drawing.state(scale, logits)) is False:
                return scale + 1
            if not continues and scale == drawing.last_guided_scale < drawing.num_scales - 1:
                scales.drop_contexts()
    return drawing.num_scales
