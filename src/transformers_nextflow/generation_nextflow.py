"""Generation: the scale loop that draws a picture on the key-value cache, and text as transformers writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.utils import ModelOutput

from .cached_sequences import CachedSequences
from .sampling_nextflow import Generators, ImageSampling, guide
from .scale_drawing import Drawing, ScaleState
from .sequence_layout import layout_sequence


PICTURE_INPUTS = ("pixel_values", "image_tokens", "image_grids")


@dataclass
class ImageGenerationOutput(ModelOutput):
    """Pictures as codes.

    Args:
        image_tokens: (B, N) codes, padded with -1 where pictures differ or were stopped early.
        image_grids: (B, 2) final grids.
    """

    image_tokens: torch.LongTensor | None = None
    image_grids: torch.LongTensor | None = None


ScaleCallback = Callable[[nn.Module, int, ScaleState], bool | None]


class NextFlowGenerationMixin(GenerationMixin):
    """`generate` writes text; `generate_images` draws."""

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        if "input_ids" in model_kwargs and model_kwargs["input_ids"].shape[1] > 0:
            inputs_tensor = model_kwargs["input_ids"]
        cache = model_kwargs.get("past_key_values")
        if inputs_tensor.ndim == 2 and cache is not None and inputs_tensor.shape[1] <= cache.get_seq_length():
            # Pictures take fewer positions than slots, and the cache does not tell how many it holds.
            raise ValueError(
                f"{inputs_tensor.shape[1]} tokens came with a cache of {cache.get_seq_length()}; give generate the "
                "whole sequence, what is in the cache included."
            )
        if inputs_tensor.ndim != 2:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs).expand(3, -1, -1)
        schedules = self.model.schedules_of(model_kwargs.get("image_grids"))
        mask = model_kwargs.get("attention_mask")
        return layout_sequence(inputs_tensor, mask, schedules, self.config).position_ids

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        # Pictures that are in the cache already are not read again; an earlier answer's cache may hold some of them.
        pictures = {name: inputs.pop(name, None) for name in PICTURE_INPUTS}
        if is_first_iteration and pictures["image_grids"] is not None:
            cache = inputs.get("past_key_values")
            cached = cache.get_seq_length() if cache is not None else 0
            fresh = (input_ids == self.config.eoi_token_id).nonzero()[:, 1] >= cached
            if bool(fresh.any()):
                inputs |= {name: value[fresh] for name, value in pictures.items() if value is not None}
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        # Pictures are listed row by row of the batch: their rows repeat with the rows that hold them.
        pictures = {name: kwargs.pop(name, None) for name in PICTURE_INPUTS}
        if expand_size > 1 and input_ids is not None and pictures["image_grids"] is not None:
            counts = (input_ids == self.config.eoi_token_id).sum(1).tolist()
            groups = torch.arange(sum(counts)).split(counts)
            order = torch.cat([group for group in groups for _ in range(expand_size)])
            pictures = {name: value if value is None else value[order] for name, value in pictures.items()}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | {name: value for name, value in pictures.items() if value is not None}

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, logits_processor=None, **kwargs):
        """Continue sequences (B, L) with text; all else as in [`~transformers.GenerationMixin.generate`].

        Pictures come as `pixel_values` and `image_grids` (the processor's output), or as `image_tokens` and
        `image_grids`. Codes and the tokens around pictures are never written: see `generate_images`.
        """
        config = self.config
        silent = [config.boi_token_id, config.eoi_token_id, config.image_token_id]
        silent += range(config.text_config.vocab_size, config.vocab_size)
        processors = LogitsProcessorList([SuppressTokensLogitsProcessor(silent, device=self.device)])
        return super().generate(inputs, generation_config, processors + (logits_processor or []), **kwargs)

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        image_sizes: Sequence[tuple[int, int]],
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        sampling: ImageSampling | None = None,
        generator: Generators = None,
        callback: ScaleCallback | None = None,
        given_image_tokens: torch.LongTensor | None = None,
    ) -> ImageGenerationOutput:
        """Draw one picture for each prompt, scale by scale: a grid of codes in each forward pass.

        Args:
            input_ids: (B, L) prompts, left padded, that end with `<boi>`.
            attention_mask: (B, L).
            image_sizes: (height, width) in pixels of each picture; they may differ.
            negative_input_ids, negative_attention_mask: (B, L') what guidance leads away from; they end with `<boi>`.
            pixel_values, image_tokens, image_grids: pictures in the prompts, as in `forward`.
            sampling: default: the checkpoint's own, from its generation config.
            generator: one for all, or one for each picture: then a picture depends on its own seed alone.
            callback: `callback(model, scale, state)` after each scale, counted from 0; `False` stops the drawing.
            given_image_tokens: (B, n) codes of the first whole scales, which are kept and not drawn.

        Raises:
            ValueError: if the prompts do not end with `<boi>`, sizes or generators do not match them, or guidance has
                nothing to lead away from.
        """
        sampling = sampling or self.default_image_sampling
        schedules = [self.config.vq_config.scale_schedules.for_size(height, width) for height, width in image_sizes]
        guided = any(sampling.is_guided(0, schedule.num_scales) for schedule in schedules)
        self._check_prompts(input_ids, schedules, guided, negative_input_ids)

        if image_tokens is None and pixel_values is not None:
            image_tokens = self.get_image_tokens(pixel_values, image_grids)
        copies = 1
        if guided:
            copies = 2
            input_ids, attention_mask = _join_left_padded(
                (input_ids, attention_mask), (negative_input_ids, negative_attention_mask)
            )
            image_tokens, image_grids = self._pictures_of_both(input_ids, image_tokens, image_grids)
        drawing = Drawing(self, schedules, sampling, generator)
        sequences = CachedSequences(self.model)
        hidden_states = sequences.read(input_ids, attention_mask, image_tokens, image_grids)[:, -1:]
        for scale in range(drawing.num_scales):
            if scale > 0:
                hidden_states = sequences.read_slots(*drawing.slots(scale, copies))
            logits = self.visual_head(hidden_states)
            if copies == 2:
                logits = guide(*logits.chunk(2), drawing.guidance[scale])
                if scale == drawing.last_guided_scale:
                    sequences.keep(range(len(schedules)))
                    copies = 1
            drawing.draw(scale, logits, given_image_tokens)
            if callback is not None and callback(self, scale, drawing.state(scale, logits)) is False:
                break
        return ImageGenerationOutput(
            image_tokens=drawing.image_tokens[:, : max(drawing.counts(scale))],
            image_grids=torch.tensor([schedule.final_grid for schedule in schedules], device=input_ids.device),
        )

    @property
    def default_image_sampling(self) -> ImageSampling:
        """The settings a checkpoint was tuned with: `image_sampling` of its generation config."""
        return ImageSampling(**(getattr(self.generation_config, "image_sampling", None) or {}))

    def _check_prompts(self, input_ids, schedules, guided, negative_input_ids):
        if len(schedules) != len(input_ids):
            raise ValueError(f"{len(input_ids)} prompts came with {len(schedules)} image_sizes; give one for each.")
        if guided and negative_input_ids is None:
            raise ValueError("Guidance needs negative_input_ids; take an empty prompt, or guidance_scale=1.")
        for name, ids in (("input_ids", input_ids), ("negative_input_ids", negative_input_ids)):
            if ids is not None and not bool((ids[:, -1] == self.config.boi_token_id).all()):
                raise ValueError(f"Every row of {name} must end with <boi> ({self.config.boi_token_id}), left padded.")
        if guided and len(negative_input_ids) != len(input_ids):
            raise ValueError(f"{len(input_ids)} prompts came with {len(negative_input_ids)} negative ones.")

    def _pictures_of_both(self, input_ids, image_tokens, image_grids):
        """Codes and grids of the pictures in prompts and negative prompts; the latter hold all of them or none."""
        if image_grids is None:
            return None, None
        in_prompts, in_negatives = (half.eq(self.config.eoi_token_id).sum() for half in input_ids.chunk(2))
        if in_negatives == 0:
            return image_tokens, image_grids
        if in_negatives != in_prompts:
            raise ValueError(
                f"Negative prompts hold the {in_prompts} pictures of the prompts, or none; got {in_negatives}."
            )
        return image_tokens.repeat(2, 1), image_grids.repeat(2, 1)


def _join_left_padded(*parts: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Batches (B, L) of different lengths as one, padded on the left."""
    length = max(ids.shape[1] for ids, _ in parts)
    joined, masks = [], []
    for ids, mask in parts:
        mask = torch.ones_like(ids) if mask is None else mask
        missing = length - ids.shape[1]
        joined.append(nn.functional.pad(ids, (missing, 0), value=0))
        masks.append(nn.functional.pad(mask, (missing, 0), value=0))
    return torch.cat(joined), torch.cat(masks)
