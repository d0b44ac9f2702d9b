"""TokenFlow-t2i's drawing: NextFlow's scale loop with rounds of refinement, and a cache, which the original lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..generation.cached_sequences import CachedSequences, Prompts, join_prompts
from ..generation.sampling import Generators, ImageSampling
from ..generation.scale_loop import ImageCodes, ImageGenerationOutput, ScaleCallback, check_drawing, draw_scales
from ..sequence.layout import check_num_positions
from ..utils.evaluation_mode import in_evaluation_mode


@dataclass(frozen=True)
class RefinedImageSampling(ImageSampling):
    """[`ImageSampling`] with rounds of refinement.

    In a round the slots of a scale read its own codes too, and all its codes are sampled anew. The first scale, whose
    slot is the prompt's last token, is not refined.

    Args:
        refinements: `(top_k, top_p)` of each round; a `top_k` of `None` allows all codes. The original's three rounds
            are `top_k=1200, top_p=0.8` at first, then `refinements=((100, 0.8), (1, 1.0))`.
    """

    refinements: Sequence[tuple[int | None, float]] = ()

    def __post_init__(self):
        super().__post_init__()
        rounds = self.refinements if isinstance(self.refinements, Sequence) else [self.refinements]
        if not all(isinstance(options, Sequence) and len(options) == 2 for options in rounds):
            raise ValueError(f"refinements must be pairs of top_k and top_p, got {self.refinements!r}.")
        self.rounds  # raises for values out of range

    @property
    def rounds(self) -> list[ImageSampling]:
        """The settings of the first round and of each refinement."""
        first = replace(self, refinements=()) if self.refinements else self
        return [first, *(replace(first, top_k=top_k, top_p=top_p) for top_k, top_p in self.refinements)]


class PromptedSequences(CachedSequences):
    """Prompts with one image each on one cache; slots follow the prompt's last token one by one."""

    def read(self, prompts: Prompts) -> torch.Tensor:
        """Read prompts (R, L) without images; returns hidden states (R, L, D)."""
        self.position = prompts.mask.sum(-1, keepdim=True) - 1
        self._begin(len(prompts.mask), prompts.mask)
        outputs = self.model.read(prompts.input_ids, prompts.attention_mask, past_key_values=self.cache, use_cache=True)
        return outputs.last_hidden_state

    def slot_origins(self, rows: torch.Tensor) -> torch.Tensor:
        """The position of the last token of each prompt, (1, C, B, 1)."""
        return self.position[rows][None]

    def read_slots(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, occupied: torch.Tensor | None, rows: torch.Tensor
    ) -> torch.Tensor:
        """Read the slots (B, n, D) of a scale at `position_ids` (1, C, B, n).

        All `rows` (C, B) read; returns hidden states (C, B, n, D).
        """
        embeds = embeds.expand(len(rows), -1, -1, -1).flatten(0, 1)
        return self._read(embeds, position_ids.flatten(0, 2), occupied).unflatten(0, rows.shape)

    def read_slots_again(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, occupied: torch.Tensor | None, rows: torch.Tensor
    ) -> torch.Tensor:
        """Read the slots of the last read scale again, with other embeddings; later scales attend to the first
        reading.
        """
        first, valid = [(layer.keys, layer.values) for layer in self.cache.layers], self.valid
        self.cache.crop(-embeds.shape[1])
        self.valid = None if valid is None else valid[:, : -embeds.shape[1]]
        hidden_states = self.read_slots(embeds, position_ids, occupied, rows)
        for layer, (keys, values) in zip(self.cache.layers, first):
            layer.keys, layer.values = keys, values
        self.valid = valid
        return hidden_states


class RefinedImageCodes(ImageCodes):
    """Images of one size; their slots read all scales before, and in refinement their own codes too."""

    def __init__(self, model, schedules, sampling: ImageSampling, generator: Generators, given_image_tokens):
        super().__init__(model, schedules, sampling, generator, given_image_tokens)
        self.rounds = getattr(sampling, "rounds", [sampling])

    def slots(self, scale: int, round_: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        (schedule,) = self.groups
        embeds = self.model.embed_slots(self.image_tokens, scale, with_own_codes=round_ > 0)
        start, stop = schedule.offsets[scale : scale + 2]
        return embeds, torch.arange(start, stop, device=embeds.device), None


class TokenFlowT2IDrawingMixin:
    """`generate_images` draws; there is no `generate`, since the model writes no text."""

    @in_evaluation_mode
    @torch.no_grad()
    def generate_images(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
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
            image_sizes: (height, width) in pixels of each image: the only size of the model, which is the default.
            negative_input_ids, negative_attention_mask: (B, L') the negative prompts, which guidance needs.
            sampling: default: `config.image_sampling`.
            generator: one for all, or one for each image.
            callback: `callback(model, scale, state)` after each scale, counted from 0; `False` stops the drawing.
            given_image_tokens: (B, n) codes of the first scales, which are kept and not sampled.

        Raises:
            ValueError: for inputs that do not fit together, another size, and unsupported arguments, such as images in
                prompts.
        """
        given = sorted(name for name, value in unknown.items() if value is not None)
        if given:
            raise ValueError(f"TokenFlow-t2i draws only from text and does not take {', '.join(given)}.")
        check_drawing(sampling, callback)
        sampling = sampling or self.default_image_sampling
        schedules = [self.config.schedule] * len(input_ids)
        contexts = sampling.contexts([self.config.schedule.num_scales])
        if "unconditional" in contexts:
            raise ValueError("TokenFlow-t2i reads no images; leave image_guidance_scale at 1.")
        prompts = [Prompts(input_ids, attention_mask)]
        if contexts:
            prompts.append(Prompts(negative_input_ids, negative_attention_mask))
        self._check_prompts(prompts, image_sizes)

        drawing = RefinedImageCodes(self, schedules, sampling, generator, given_image_tokens)
        sequences, joined = PromptedSequences(self), join_prompts(prompts)
        rows = torch.arange(len(joined.input_ids), device=input_ids.device).view(len(prompts), -1)
        hidden_states = sequences.read(joined)[:, -1:].unflatten(0, rows.shape)
        scales = draw_scales(self, drawing, sequences, hidden_states, rows, callback, continues=False)
        return drawing.generated(scales)

    @property
    def default_image_sampling(self) -> RefinedImageSampling:
        """The checkpoint's own settings: `image_sampling` of its config."""
        return RefinedImageSampling.from_dict(self.config.image_sampling)

    # The model reads no images; `generate_images` refuses them.
    default_editing_sampling = default_image_sampling

    def _check_prompts(self, prompts, image_sizes):
        count, size = len(prompts[0].input_ids), self.config.image_size
        if count < 1:
            raise ValueError("There is no prompt: input_ids have no rows.")
        for other in image_sizes or []:
            if tuple(other) != size:
                raise ValueError(
                    f"TokenFlow-t2i draws only images of {size[0]}x{size[1]} pixels, got {other[0]}x{other[1]}."
                )
        if image_sizes is not None and len(image_sizes) != count:
            raise ValueError(f"{count} prompts came with {len(image_sizes)} image_sizes; give one for each.")
        if any(part.input_ids is None for part in prompts):
            raise ValueError("Guidance needs negative_input_ids; use an empty prompt, or guidance_scale=1.")
        for part in prompts:
            if len(part.input_ids) != count:
                raise ValueError(f"{count} prompts came with {len(part.input_ids)} negative ones.")
            # The first slot is the prompt's last token.
            check_num_positions(int(part.mask.sum(1).max()) + self.config.schedule.num_tokens - 1, self.config)
