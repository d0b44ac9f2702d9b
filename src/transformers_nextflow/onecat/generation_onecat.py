"""OneCAT's drawing: NextFlow's scale loop, with its own slots, and with bits in place of codes of a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..generation.cached_sequences import CachedSequences, Prompts, join_prompts
from ..generation.sampling import Generators, ImageSampling, sampled_probabilities
from ..generation.scale_loop import (
    EagerScales,
    ImageCodes,
    ImageGenerationOutput,
    ScaleCallback,
    check_drawing,
    draw_scales,
)
from ..scale_schedule import ScaleSchedule
from ..sequence.layout import check_num_positions
from ..sequence.padding import check_left_padded
from ..utils.evaluation_mode import in_evaluation_mode
from ..utils.short_repr import short_repr
from .backbone import TokenKinds
from .schedules import cell_positions


@dataclass(frozen=True)
class BitwiseImageSampling(ImageSampling):
    """[`ImageSampling`] of bits: each bit of a code is sampled from two classes, to which top-k and top-p apply."""


@dataclass(frozen=True)
class BitwiseEditingSampling(BitwiseImageSampling):
    """The same for edits, whose contexts first leave out the image, and then the instruction too.

    Logits are `neither + guidance_scale * (instruction - neither) + image_guidance_scale * (all - instruction)`. With
    the original's `cfg_text` and `cfg_image`, `guidance_scale = cfg_text` and
    `image_guidance_scale = cfg_text / (1 + cfg_image)`.
    """

    guided_parts: ClassVar[tuple[str, str]] = ("image_guidance_scale", "guidance_scale")

    def contexts(self, scale_counts) -> tuple[str, ...]:
        """As in [`ImageSampling`]; "negative" is the instruction without the image, "unconditional" neither."""
        is_guided = any(self.is_guided(count, part) for count in set(scale_counts) for part in self.guided_parts)
        return ("negative", "unconditional") if is_guided else ()


def sample_bits(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: Generators = None,
) -> torch.Tensor:
    """Bits (…) sampled independently from logits (…, 2), in float32.

    The random numbers are those that `torch.multinomial` would use, so that a seed gives the same bits as in the
    original. `generator` is as in `sample_codes`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = sampled_probabilities(logits, temperature, top_k, top_p)
    return (probabilities / _exponential_noise(probabilities.shape, generator, logits.device)).argmax(-1)


def _exponential_noise(shape: Sequence[int], generator: Generators, device: torch.device) -> torch.Tensor:
    """Exponentially distributed numbers: the class is sampled whose number, divided by its probability, is smaller."""
    if isinstance(generator, Sequence):
        return torch.stack([_exponential_noise(shape[1:], source, device) for source in generator])
    source_device = device if generator is None else generator.device
    return torch.empty(shape, device=source_device).exponential_(generator=generator).to(device)


class OneCatSequences(CachedSequences):
    """Prompts with one image each on one cache; the slots of a scale share an expert."""

    def __init__(self, model: nn.Module, drawing: BitwiseImageCodes):
        super().__init__(model)
        self.drawing = drawing

    def read_prompts(self, prompts: Prompts, pixel_values=None, pixel_sizes=None):
        """Read prompts (R, L), padded on the left, with images; afterwards `position` is that of each last token."""
        mask = prompts.mask
        self.position = mask.sum(-1, keepdim=True) - 1
        self._begin(len(mask), mask)
        self.model.read(
            prompts.input_ids,
            self.valid,
            (mask.cumsum(-1) - 1).clamp_min(0).expand(2, -1, -1),
            self.cache,
            pixel_values,
            pixel_sizes,
            use_cache=True,
        )

    def slot_origins(self, rows: torch.Tensor) -> torch.Tensor:
        """The position (2, C, B, 1) after the last token of each prompt."""
        return (self.position[rows][None] + 1).expand(2, -1, -1, -1)

    def _read(self, *args, **kwargs) -> torch.Tensor:
        return super()._read(*args, **kwargs, kinds=TokenKinds.all_of(self.drawing.scale))


class BitwiseImageCodes(ImageCodes):
    """Images whose codes are drawn bit by bit. `scale` is the scale whose slots were made last."""

    scale = 0

    def slots(self, scale: int, round_: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        self.scale = scale
        drawing = {schedule: rows for schedule, rows in self.groups.items() if scale < schedule.num_scales}
        parts = [
            (rows, self.model.slot_features(self.image_tokens[rows], schedule, scale), cell_positions(schedule, scale))
            for schedule, rows in drawing.items()
        ]
        device = self.image_tokens.device
        if len(self.groups) == 1:
            ((_, features, places),) = parts
            return self.model.embed_slots(features, scale), places.to(device)[:, None, None], None
        width = max(schedule.tokens_per_scale[scale] for schedule in drawing)
        count, (_, sample, _) = len(self.schedules), parts[0]
        features = sample.new_zeros(count, width, sample.shape[-1])
        places = torch.zeros(2, count, width, dtype=torch.long, device=device)
        occupied = torch.zeros(count, width, dtype=torch.long, device=device)
        for rows, own, own_places in parts:
            features[rows, : own.shape[1]] = own
            places[:, rows, : own.shape[1]] = own_places.to(device)[:, None]
            occupied[rows, : own.shape[1]] = 1
        return self.model.embed_slots(features, scale), places[:, None], occupied

    def _sample_codes(self, logits: torch.Tensor, **options) -> torch.Tensor:
        return self.model.vq_model.quantizer.to_tokens(sample_bits(logits.unflatten(-1, (-1, 2)), **options))


class OneCatDrawingMixin:
    """`generate_images` draws and edits."""

    @in_evaluation_mode
    @torch.no_grad()
    def generate_images(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        image_sizes: Sequence[tuple[int, int]],
        pixel_values: torch.Tensor | None = None,
        pixel_sizes: torch.LongTensor | None = None,
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        unconditional_input_ids: torch.LongTensor | None = None,
        unconditional_attention_mask: torch.Tensor | None = None,
        sampling: ImageSampling | None = None,
        generator: Generators = None,
        callback: ScaleCallback | None = None,
        given_image_tokens: torch.LongTensor | None = None,
        **unknown,
    ) -> ImageGenerationOutput:
        """Draw one image for each prompt, as [`~NextFlowForConditionalGeneration.generate_images`] does.

        Args:
            input_ids: (B, L) prompts, left padded.
            attention_mask: (B, L).
            image_sizes: (height, width) in pixels of each image; they may differ.
            pixel_values, pixel_sizes: images that the prompts refer to, as in `embed_prompts`, for edits.
            negative_input_ids, negative_attention_mask: (B, L') prompts that guidance compares with: the negative
                prompts; in edits the instructions without images.
            unconditional_input_ids, unconditional_attention_mask: (B, L'') in edits the negative prompts.
            sampling: default: `config.image_sampling`, or `config.editing_sampling` if there are images.
            generator: one for all, or one for each image; then an image depends only on its own seed.
            callback: `callback(model, scale, state)` after each scale, counted from 0; `False` stops the drawing.
            given_image_tokens: (B, n) codes of the first scales, which are kept and not sampled.

        Raises:
            ValueError: for inputs that do not fit together, sizes without a schedule, and unsupported arguments.
        """
        if given := sorted(name for name, value in unknown.items() if value is not None):
            raise ValueError(f"OneCAT does not take {', '.join(given)} where it draws.")
        check_drawing(sampling, callback)
        is_edit = pixel_values is not None
        sampling = self._sampling(sampling, is_edit)
        schedules = self._schedules(image_sizes, len(input_ids))
        contexts = sampling.contexts([schedule.num_scales for schedule in schedules])
        if "unconditional" in contexts and not is_edit:
            raise ValueError("image_guidance_scale leads towards input images; give pixel_values, or leave it at 1.")
        prompts = [Prompts(input_ids, attention_mask)]
        given_prompts = {
            "negative": Prompts(negative_input_ids, negative_attention_mask),
            "unconditional": Prompts(unconditional_input_ids, unconditional_attention_mask),
        }
        prompts += [given_prompts[name] for name in contexts]
        self._check_prompts(prompts, contexts, schedules)

        drawing = BitwiseImageCodes(self, schedules, sampling, generator, given_image_tokens)
        sequences, joined, places = OneCatSequences(self, drawing), join_prompts(prompts), None
        rows = torch.arange(len(joined.input_ids), device=input_ids.device).view(len(prompts), -1)
        if not is_edit:
            joined, places = joined.distinct()
        sequences.read_prompts(joined, pixel_values, pixel_sizes)
        if places is not None:
            sequences.keep(places)
        hidden_states = EagerScales(drawing, sequences, rows).read(0)
        scales = draw_scales(self, drawing, sequences, hidden_states, rows, callback, continues=False)
        return drawing.generated(scales)

    @property
    def default_image_sampling(self) -> BitwiseImageSampling:
        """`image_sampling` of the config."""
        return BitwiseImageSampling.from_dict(self.config.image_sampling)

    @property
    def default_editing_sampling(self) -> BitwiseEditingSampling:
        """`editing_sampling` of the config."""
        return BitwiseEditingSampling.from_dict(self.config.editing_sampling)

    def _sampling(self, sampling: ImageSampling | None, is_edit: bool) -> ImageSampling:
        if sampling is None:
            return self.default_editing_sampling if is_edit else self.default_image_sampling
        if is_edit and not isinstance(sampling, BitwiseEditingSampling):
            return BitwiseEditingSampling(**sampling.to_dict())
        return sampling

    def _schedules(self, image_sizes: Sequence[tuple[int, int]], count: int) -> list[ScaleSchedule]:
        if count < 1:
            raise ValueError("There is no prompt: input_ids have no rows.")
        if not isinstance(image_sizes, Sequence):
            raise ValueError(f"image_sizes are pairs of height and width in pixels, got {short_repr(image_sizes)}.")
        if len(image_sizes) != count:
            raise ValueError(f"{count} prompts came with {len(image_sizes)} image_sizes; give one for each.")
        return [self.config.vq_config.scale_schedules.for_size(height, width) for height, width in image_sizes]

    def _check_prompts(self, prompts: Sequence[Prompts], contexts: Sequence[str], schedules: Sequence[ScaleSchedule]):
        longest = max(max(schedule.final_grid) for schedule in schedules)
        for name, part in zip(("", *contexts), prompts):
            if part.input_ids is None:
                raise ValueError(f"Guidance needs {name}_input_ids; give them, or leave guidance at 1.")
            if len(part.input_ids) != len(schedules):
                raise ValueError(f"{len(schedules)} prompts came with {len(part.input_ids)} {name} ones.")
            check_left_padded(part.mask, f"{name} prompts".strip())
            check_num_positions(int(part.mask.sum(1).max()) + longest, self.config)
