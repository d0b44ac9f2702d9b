"""Generation: text as transformers writes it, images scale by scale, and both in turn on one cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .generation.cached_sequences import Prompts
from .generation.compiled_drawing import CompiledDrawing
from .generation.interleaved import InterleavedGenerationOutput, InterleavedLoop, InterleavedStreamer
from .generation.region_editing import KeptRegion
from .generation.sampling import Generators, ImageSampling
from .generation.scale_loop import ImageCodes, ImageGenerationOutput, ScaleCallback, check_drawing
from .generation.sequence_writer import SequenceWriter
from .generation.stored_sampling import SAMPLINGS, StoredSamplingMixin
from .generation.text import TextGenerationMixin
from .scale_schedule import ScaleSchedule
from .sequence.layout import check_new_positions, layout_sequence
from .utils.evaluation_mode import in_evaluation_mode
from .utils.known_names import checks_names, nearest_name
from .utils.short_repr import short_repr
from .utils.typed_values import check_types
from .utils.user_warnings import warn_user


logger = logging.get_logger(__name__)

DEFAULT_MAX_NEW_TOKENS = 256
# The settings of a generation config that `generate_interleaved` uses.
TEXT_SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "stop_strings", "eos_token_id")
TEXT_TYPES = {
    "do_sample": bool | None, "temperature": float | None, "top_k": int | None, "top_p": float | None,
    "stop_strings": str | list[str] | None, "eos_token_id": int | list[int] | None,
}  # fmt: skip
# Other settings that such a config may hold.
OTHER_SETTINGS = {
    "max_new_tokens", "bos_token_id", "pad_token_id", "transformers_version", *SAMPLINGS,
}  # fmt: skip
# Settings that change the text of `generate` only, with the value besides `None` and 0 that changes nothing.
UNUSED_SETTINGS = {"num_beams": 1, "repetition_penalty": 1, "typical_p": 1, "guidance_scale": 1} | dict.fromkeys((
    "min_length", "min_new_tokens", "min_p", "top_h", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size",
    "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "watermarking_config",
))  # fmt: skip

# What the user should do if a context of guidance is missing.
REMEDIES = {
    "negative": "an empty prompt, or guidance_scale=1",
    "unconditional": "the negative prompt without images, or image_guidance_scale=1",
}


def _warn_of_unused(config: GenerationConfig):
    """Warn of settings of the model's own generation config that change the text of `generate` only."""
    given = {name: getattr(config, name, None) for name in UNUSED_SETTINGS}
    if unused := [name for name, value in given.items() if value and value != UNUSED_SETTINGS[name]]:
        warn_user(
            f"The model's generation config sets {', '.join(unused)}, which generate uses and generate_interleaved "
            "does not: the two may answer differently; remove them from model.generation_config."
        )


def _with_nearest(name: str) -> str:
    known = (*TEXT_SETTINGS, "max_new_tokens", "generator", "sampling", "max_images", "height", "width")
    nearest = nearest_name(name, known)
    return f"{name} (did you mean {nearest}?)" if nearest else name


def _check_text_settings(text: GenerationConfig, max_new_tokens: int | None, streamer):
    given = {name: getattr(text, name) for name in TEXT_TYPES} | {"max_new_tokens": max_new_tokens}
    check_types(given, TEXT_TYPES | {"max_new_tokens": int | None}, "generate_interleaved")
    stops = [text.stop_strings] if isinstance(text.stop_strings, str) else text.stop_strings or []
    if "" in stops:
        raise ValueError("stop_strings must not be empty: '' is found everywhere.")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ValueError(f"streamer must have put and end, as transformers' TextStreamer, got {short_repr(streamer)}.")


class NextFlowGenerationMixin(StoredSamplingMixin, TextGenerationMixin):
    """`generate` writes text; `generate_images` draws; `generate_interleaved` does both in turn.

    All of them run in evaluation mode, whatever mode the model is in.
    """

    # Set by `compile_drawing`.
    compiled_drawing: CompiledDrawing | None = None

    def compile_drawing(self, enabled: bool = True, fuse: bool | None = None):
        """Draw with recorded scales from now on: with key-value buffers of fixed size, and on CUDA one captured graph
        for each scale.

        A kind of drawing (size, number of images, guided or not, length of the prompts up to 64, 128, 256 … tokens) is
        recorded the first time and replayed afterwards. The codes are those of uncompiled drawing. Images of different
        sizes in a batch, several images in a conversation, other attentions than "scale_sdpa" and offloaded models are
        drawn uncompiled, and the log says so. Call this method again after adapters were loaded.

        To compile text generation, use transformers' `generate(…, cache_implementation="static")`.

        Args:
            enabled: `False` draws uncompiled again, and frees recordings and buffers.
            fuse: compile the backbone with `torch.compile`, inside of the graphs; default: on CUDA.
        """
        self.compiled_drawing = CompiledDrawing(self, fuse) if enabled else None

    def generate(
        self, inputs=None, generation_config=None, logits_processor=None, generation_mode: str | None = None, **kwargs
    ):
        """Continue sequences (B, L) with text; all else is as in [`~transformers.GenerationMixin.generate`].

        Images are given as `pixel_values` and `image_grids` (the processor's output), or as `image_tokens` and
        `image_grids`. Codes and the tokens around images are written only with `generation_mode="image"`.

        Args:
            generation_mode: "text" (default) or "image". With "image" one image is drawn after each row, and the result
                are the codes (B, N) that `decode_image_tokens` takes. Further arguments are those of `generate_images`;
                `image_sizes` is the model's largest square by default. Without `negative_input_ids` there is no
                guidance.

        Raises:
            ValueError: if placeholders and images do not match, for prompts that with `max_new_tokens` take more
                positions than the model has, and for settings that cannot be carried out.
        """
        if generation_mode in (None, "text"):
            return super().generate(inputs, generation_config, logits_processor, **kwargs)
        if generation_mode != "image":
            raise ValueError(f"generation_mode is one of {self.output_modalities}, got {generation_mode!r}.")
        # The number of codes follows from the size; transformers' pipelines always give a number of tokens.
        for name in ("max_new_tokens", "generation_config"):
            kwargs.pop(name, None)
        input_ids = kwargs.pop("input_ids", inputs)
        mask = kwargs.pop("attention_mask", None)
        if not bool((input_ids[:, -1] == self.config.boi_token_id).all()):
            # A chat prompt ends with the start of the answer, to which `<boi>` is added for an image.
            boi = torch.full_like(input_ids[:, :1], self.config.boi_token_id)
            input_ids = torch.cat([input_ids, boi], dim=1)
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        side = self.config.vq_config.scale_schedules.resolutions[-1]
        kwargs.setdefault("image_sizes", [(side, side)] * len(input_ids))
        if kwargs.get("negative_input_ids") is None and kwargs.get("sampling") is None:
            logger.warning_once("An image is drawn without guidance, which takes negative_input_ids: an empty prompt.")
            kwargs["sampling"] = replace(self.default_image_sampling, guidance_scale=1.0, image_guidance_scale=1.0)
        return self.generate_images(input_ids, mask, **kwargs).image_tokens

    @checks_names
    @in_evaluation_mode
    @torch.no_grad()
    def generate_images(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        image_sizes: Sequence[tuple[int, int]],
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        unconditional_input_ids: torch.LongTensor | None = None,
        unconditional_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        sampling: ImageSampling | None = None,
        generator: Generators = None,
        callback: ScaleCallback | None = None,
        given_image_tokens: torch.LongTensor | None = None,
        region: KeptRegion | None = None,
    ) -> ImageGenerationOutput:
        """Draw one image for each prompt, scale by scale: a grid of codes in each forward pass.

        Args:
            input_ids: (B, L) prompts, left padded, that end with `<boi>`.
            attention_mask: (B, L).
            image_sizes: (height, width) in pixels of each image; they may differ.
            negative_input_ids, negative_attention_mask: (B, L') negative prompts, which guidance needs; they end with
                `<boi>` and hold all images of the prompts, or none.
            unconditional_input_ids, unconditional_attention_mask: (B, L'') the negative prompts without their images,
                which are needed if images have a guidance scale of their own (`image_guidance_scale`).
            pixel_values, image_tokens, image_grids: images in the prompts, as in `forward`.
            sampling: settings of sampling; default: the checkpoint's own, from its generation config.
            generator: one for all, or one for each image; then an image depends only on its own seed.
            callback: `callback(model, scale, state)` after each scale, counted from 0; `False` stops the drawing.
            given_image_tokens: (B, n) codes of the first scales, which are kept and not sampled; padded with -1 if an
                image has fewer of them.
            region: images that are kept outside of a region, see [`KeptRegion`].

        Raises:
            ValueError: if the prompts do not end with `<boi>`, sizes, generators or given codes do not match them,
                guidance has no negative prompts, or prompts and images take more positions than the model has.
        """
        check_drawing(sampling, callback)
        sampling = sampling or self.default_image_sampling
        schedules = self._schedules(image_sizes, len(input_ids))
        self._check_at_boi("input_ids", input_ids)
        drawing = ImageCodes(self, schedules, sampling, generator, given_image_tokens, region)
        writer = self.sequence_writer(
            Prompts(input_ids, attention_mask, image_tokens, image_grids),
            Prompts(negative_input_ids, negative_attention_mask),
            Prompts(unconditional_input_ids, unconditional_attention_mask),
            schedules=schedules,
            sampling=sampling,
            max_new_positions=[schedule.num_positions(self.config.read_last_scale) - 1 for schedule in schedules],
            pixel_values=pixel_values,
        )
        scales = writer.draw(drawing, range(len(schedules)), callback, continues=False)
        return drawing.generated(scales)

    @in_evaluation_mode
    @torch.no_grad()
    def generate_interleaved(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        min_images: int = 0,
        max_images: int = 1,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        unconditional_input_ids: torch.LongTensor | None = None,
        unconditional_attention_mask: torch.Tensor | None = None,
        sampling: ImageSampling | None = None,
        generator: Generators = None,
        generation_config: GenerationConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callback: ScaleCallback | None = None,
        streamer: InterleavedStreamer | None = None,
        **kwargs,
    ) -> InterleavedGenerationOutput:
        """Continue sequences with text, images, or both, on one cache: text until `<boi>`, an image's scales, text
        again.

        A row continues until its end of turn, a stop string, or a limit. Rows at `<boi>` wait until all other rows are
        at `<boi>` or have ended; then they are drawn together.

        Args:
            input_ids, attention_mask: (B, L) prompts, left padded. A row that ends with `<boi>` draws first.
            pixel_values, image_tokens, image_grids: images in the prompts, as in `forward`.
            max_new_tokens: the largest number of text tokens of a row, `<boi>` not counted; default: the generation
                config's, or 256.
            min_images, max_images: how many images a row draws. Between the two the model decides; a row that would end
                before `min_images` continues with an image. `max_images=0` gives only text, `max_new_tokens=0` only
                images.
            image_sizes: (height, width) in pixels of the images of each row. Default: the size of the row's last
                image; where it has none, the model's largest square.
            negative_input_ids, negative_attention_mask: (B, L') negative prompts of every image; they end with `<boi>`.
                Without guidance they are not needed.
            unconditional_input_ids, unconditional_attention_mask: (B, L'') as in `generate_images`.
            sampling: settings of images; default: the checkpoint's own, from its generation config.
            generator: one for all, or one for each row; then a row depends only on its own seed.
            generation_config, kwargs: settings of text: `do_sample`, `temperature`, `top_k`, `top_p`, `stop_strings`,
                `eos_token_id`; those that are not given are the model's generation config's, as in `generate`. A
                warning names settings of it that are not used.
            tokenizer: needed for `stop_strings`.
            callback: as in `generate_images`, for each round of drawing; `False` ends all rows as they are.
            streamer: gets text and scales while they are generated; for one row.

        Raises:
            ValueError: for other settings of text, limits out of range, generators or sizes that do not match the rows,
                stop strings without a tokenizer, a streamer with several rows, guidance without negative prompts, and
                where prompts, `max_new_tokens` and `max_images` together take more positions than the model has.
        """
        check_types({"generation_config": generation_config}, {"generation_config": GenerationConfig | None}, "Text")
        given = {} if generation_config is None else generation_config.to_diff_dict()
        unknown = sorted((set(kwargs) - set(TEXT_SETTINGS)) | (set(given) - set(TEXT_SETTINGS) - OTHER_SETTINGS))
        if unknown:
            raise ValueError(
                f"Text is not written with {', '.join(map(_with_nearest, unknown))}: its settings are "
                f"{', '.join(TEXT_SETTINGS)}. How images are drawn is sampling=ImageSampling(…)."
            )
        _warn_of_unused(self.generation_config)
        text = copy.deepcopy(generation_config or self.generation_config)
        for name in (*TEXT_SETTINGS, "max_new_tokens"):
            if getattr(text, name) is None:  # as `generate` does
                setattr(text, name, getattr(self.generation_config, name))
        text.update(**kwargs)
        _check_text_settings(text, max_new_tokens, streamer)
        check_drawing(sampling, callback)
        if max_new_tokens is None:
            max_new_tokens = text.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        sampling = sampling or self.default_image_sampling
        if image_sizes is not None:
            schedules = self._schedules(image_sizes, len(input_ids))
        else:
            schedules = self._last_schedules(input_ids, attention_mask, image_grids)
        read_last = self.config.read_last_scale
        writer = self.sequence_writer(
            Prompts(input_ids, attention_mask, image_tokens, image_grids),
            Prompts(negative_input_ids, negative_attention_mask),
            Prompts(unconditional_input_ids, unconditional_attention_mask),
            schedules=schedules if max_images > 0 else [],
            sampling=sampling,
            max_new_positions=[
                max_new_tokens + max_images * schedule.num_positions(read_last) for schedule in schedules
            ],
            pixel_values=pixel_values,
        )
        return InterleavedLoop(
            writer, max_new_tokens=max_new_tokens, min_images=min_images, max_images=max_images,
            schedules=schedules, sampling=sampling, generator=generator, text=text, tokenizer=tokenizer,
            callback=callback, streamer=streamer,
        ).run()  # fmt: skip

    @property
    def default_image_sampling(self) -> ImageSampling:
        """The checkpoint's own settings for images: `image_sampling` of its generation config."""
        return ImageSampling.from_dict(getattr(self.generation_config, "image_sampling", None) or {})

    @property
    def default_editing_sampling(self) -> ImageSampling:
        """The checkpoint's own settings for images drawn after other images: `editing_sampling` of its generation
        config, or those for all images.
        """
        settings = getattr(self.generation_config, "editing_sampling", None)
        return self.default_image_sampling if settings is None else ImageSampling.from_dict(settings)

    def sequence_writer(
        self,
        prompts: Prompts,
        negative: Prompts,
        unconditional: Prompts,
        *,
        schedules: Sequence[ScaleSchedule],
        sampling: ImageSampling,
        max_new_positions: Sequence[int],
        pixel_values: torch.Tensor | None = None,
    ) -> SequenceWriter:
        """Read prompts, and the negative ones that the guidance of images with these schedules and settings needs.

        Args:
            prompts: prompts with the codes of their images, or with the grids of `pixel_values`.
            negative, unconditional: as in `generate_images`; without `input_ids` if they were not given.
            schedules: schedules of the images to draw, one for each row; empty if no images are drawn.
            max_new_positions: the largest number of positions after each prompt.
        """
        device = prompts.input_ids.device
        prompts = replace(prompts, max_new_positions=torch.tensor(max_new_positions, device=device))
        given = {"": prompts, "negative_": negative, "unconditional_": unconditional}
        for name, part in given.items():
            if part.attention_mask is not None and not bool(part.attention_mask[:, -1].all()):
                raise ValueError(f"{name}input_ids are padded on the right; pad them on the left.")
        if prompts.image_tokens is None and pixel_values is not None:
            # Checked before the images are encoded, which takes the most time.
            read = self.model.schedules_of(prompts.image_grids)
            layout = layout_sequence(prompts.input_ids, prompts.attention_mask, read, self.config)
            check_new_positions(layout, prompts.max_new_positions, self.config)
            prompts = replace(prompts, image_tokens=self.get_image_tokens(pixel_values, prompts.image_grids))
        # A context is only ever followed by one image at a time.
        images = torch.tensor([s.num_positions(self.config.read_last_scale) - 1 for s in schedules], device=device)
        names = sampling.contexts([schedule.num_scales for schedule in schedules])
        contexts = [self._context(name, given[f"{name}_"], prompts, images) for name in names]
        return SequenceWriter(self, prompts, contexts)

    def _context(self, name: str, context: Prompts, prompts: Prompts, max_new_positions: torch.Tensor) -> Prompts:
        if context.input_ids is None:
            raise ValueError(f"Guidance needs {name}_input_ids; use {REMEDIES[name]}.")
        self._check_at_boi(f"{name}_input_ids", context.input_ids)
        if len(context.input_ids) != len(prompts.input_ids):
            raise ValueError(f"{len(prompts.input_ids)} prompts came with {len(context.input_ids)} {name}_input_ids.")
        found, of_prompts = (int((p.input_ids == self.config.eoi_token_id).sum()) for p in (context, prompts))
        if found not in (0, of_prompts):
            raise ValueError(f"{name}_input_ids hold the {of_prompts} images of the prompts, or none; got {found}.")
        images = (prompts.image_tokens, prompts.image_grids) if found else (None, None)
        return Prompts(context.input_ids, context.attention_mask, *images, max_new_positions)

    def _last_schedules(self, input_ids, attention_mask, image_grids) -> list[ScaleSchedule]:
        """For each row the schedule of its last image; without images, that of the model's largest square."""
        counts = [row.count(self.config.eoi_token_id) for row in Prompts(input_ids, attention_mask).rows()]
        schedules, square = self.model.schedules_of(image_grids), self.config.vq_config.scale_schedules.build()
        ends = accumulate(counts)
        return [schedules[end - 1] if count and end <= len(schedules) else square for count, end in zip(counts, ends)]

    def _schedules(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> list[ScaleSchedule]:
        if not isinstance(image_sizes, Sequence):
            raise ValueError(f"image_sizes are pairs of height and width in pixels, got {short_repr(image_sizes)}.")
        if len(image_sizes) != batch:
            raise ValueError(f"{batch} prompts came with {len(image_sizes)} image_sizes; give one for each.")
        return [self.config.vq_config.scale_schedules.for_size(height, width) for height, width in image_sizes]

    def _check_at_boi(self, name: str, input_ids: torch.Tensor):
        if not bool((input_ids[:, -1] == self.config.boi_token_id).all()):
            raise ValueError(f"Every row of {name} must end with <boi> ({self.config.boi_token_id}), left padded.")
