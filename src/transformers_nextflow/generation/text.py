"""`generate` of transformers for sequences with images: it reads images, writes only text, and checks its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from ..configuration_nextflow import NextFlowConfig
from ..sequence.layout import check_num_positions, layout_sequence, text_ids
from ..sequence.scale_sdpa import check_cache, is_empty
from ..utils.evaluation_mode import in_evaluation_mode
from ..utils.older_transformers import BEAM_SEARCH_EXPECTS_TEXT_LOGITS, CACHE_KEYWORD, TextVocabularyLogitsProcessor


IMAGE_INPUTS = ("pixel_values", "image_tokens", "image_grids")
# Inputs of `forward` for a single pass, which the passes of `generate` cannot share.
SINGLE_PASS_INPUTS = ("layout", "seq_idx", "labels", "image_labels", "codes_only", "num_items_in_batch")
REFUSED_SETTINGS = {
    "assistant_early_exit": "no layer but the last is trained to predict tokens",
    "use_mtp": "there is no module that predicts several tokens",
    "speculation_type": "there is no module that drafts tokens",
    "token_healing": "it replaces tokens of the prompt, and images with them",
}


class TextOnlyLogitsProcessor(LogitsProcessor):
    """Excludes codes and the tokens around images from scores (B, V), so that only text is written."""

    supports_continuous_batching = True

    def __init__(self, config: NextFlowConfig):
        self.tokens = (config.boi_token_id, config.eoi_token_id, config.image_token_id)
        self.vocab_size = config.text_config.vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.vocab_size :] = -torch.inf
        for token in self.tokens:
            scores[:, token] = -torch.inf
        return scores


class TextGenerationMixin(GenerationMixin):
    """`generate`, `generate_batch` and the methods that transformers calls in them.

    Images are read once, in the first pass in which the cache does not hold them. That pass makes its own mask, since
    the mask that transformers prepares for static caches has no blocks of scales.
    """

    _supported_generation_modes = [
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
        GenerationMode.ASSISTED_GENERATION,
    ]

    @in_evaluation_mode
    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, logits_processor=None, **kwargs):
        """Continue sequences (B, L) with text; all else is as in [`~transformers.GenerationMixin.generate`].

        Images are given as `pixel_values` and `image_grids` (the processor's output), or as `image_tokens` and
        `image_grids`. Codes and the tokens around images are never written: see `generate_images`.

        Raises:
            ValueError: if placeholders and images do not match, for prompts that with `max_new_tokens` take more
                positions than the model has, and for settings that cannot be carried out.
        """
        given = {name for name, value in kwargs.items() if value is not None}
        if "position_ids" in given and not given & {"inputs_embeds", "cache", "past_key_values"}:
            # If embeddings are given, nothing else checks the placeholders.
            schedules = self.model.schedules_of(kwargs.get("image_grids"))
            layout_sequence(kwargs.get("input_ids", inputs), kwargs.get("attention_mask"), schedules, self.config)
        return super().generate(inputs, generation_config, logits_processor, **kwargs)

    def _validate_model_kwargs(self, model_kwargs):
        refused = [name for name in SINGLE_PASS_INPUTS if model_kwargs.get(name) is not None]
        if refused:
            raise ValueError(f"generate does not take {', '.join(refused)}: each of its passes has its own.")
        super()._validate_model_kwargs(model_kwargs)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        for name, reason in REFUSED_SETTINGS.items():
            if value := getattr(generation_config, name, None):
                raise ValueError(f"generate does not take {name}={value!r}: {reason}.")
        if assistant := generation_mode_kwargs.get("assistant_model"):
            self._check_assistant(assistant, generation_config.do_sample)
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _check_assistant(self, assistant: PreTrainedModel, do_sample: bool):
        """Raises `ValueError` for an assistant that does not fit: it gets the same inputs, and with sampling its
        probabilities are compared with ours class by class.
        """
        config, size = self.config, self.config.text_config.vocab_size
        if not isinstance(assistant, TextGenerationMixin) or assistant.config.text_config.vocab_size != size:
            raise ValueError(
                "An assistant reads the same tokens, images and positions; use a NextFlow with a text vocabulary of "
                f"{size}, not this {type(assistant).__name__}."
            )
        if do_sample and assistant.config.vocab_size != config.vocab_size:
            raise ValueError(
                f"Sampling compares probabilities of {config.vocab_size} classes, text and codes, with an assistant's "
                f"of {assistant.config.vocab_size}; use do_sample=False, or a NextFlow with as many."
            )

    def _get_logits_processor(self, generation_config, *args, logits_processor=None, **kwargs):
        processors = LogitsProcessorList([TextOnlyLogitsProcessor(self.config), *(logits_processor or [])])
        if BEAM_SEARCH_EXPECTS_TEXT_LOGITS and (generation_config.num_beams or 1) > 1:
            processors.append(TextVocabularyLogitsProcessor(self.config.text_config.vocab_size))
        return super()._get_logits_processor(generation_config, *args, logits_processor=processors, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        inputs_embeds, image_grids = model_kwargs.get("inputs_embeds"), model_kwargs.get("image_grids")
        if inputs_embeds is not None:
            input_ids = text_ids(inputs_embeds, *(model_kwargs.get(name) for name in IMAGE_INPUTS))
        else:
            input_ids = model_kwargs.get("input_ids", inputs_tensor)
        cache = model_kwargs.get(CACHE_KEYWORD)
        if cache is not None and input_ids.shape[1] <= cache.get_seq_length():
            # Images take fewer positions than slots, and the number of images in the cache is not known.
            raise ValueError(
                f"{input_ids.shape[1]} tokens came with a cache of {int(cache.get_seq_length())}; give generate the "
                "whole sequence, including what is in the cache."
            )
        mask = model_kwargs.get("attention_mask")
        return layout_sequence(input_ids, mask, self.model.schedules_of(image_grids), self.config).position_ids

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        name, position_ids = generation_config.cache_implementation, model_kwargs["position_ids"]
        if "offloaded" in (name or "") and self.device.type == "cpu":
            raise ValueError(
                f"cache_implementation={name!r} moves the cache of a GPU to the CPU, where the model is already; leave "
                "it out."
            )
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("image_grids") is not None:
            raise ValueError(
                "prefill_chunk_size would split images, whose scales attend in both directions; leave it out."
            )
        position = position_ids[0] if position_ids.ndim == 3 else position_ids
        num_new_tokens = max_cache_length + 1 - position.shape[-1]
        check_num_positions(int(position.max()) + 1 + num_new_tokens, self.config)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        check_cache(model_kwargs.get(CACHE_KEYWORD), self.model.language_model.config)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        cache, images = kwargs.get(CACHE_KEYWORD), {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # The cache of an earlier answer may hold some of the images. Later passes read no images, unless there is no
        # cache. The first pass of an assistant does not have the flag for it.
        if images["image_grids"] is not None and (is_first_iteration or is_empty(cache)):
            cached = 0 if cache is None else cache.get_seq_length()
            fresh = (input_ids == self.config.eoi_token_id).nonzero()[:, 1] >= cached
            if bool(fresh.any()):
                inputs |= {name: value[fresh] for name, value in images.items() if value is not None}
                inputs["attention_mask"] = attention_mask
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        # Images are listed row by row of the batch, so they are repeated with their rows.
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        if expand_size > 1 and input_ids is not None and images["image_grids"] is not None:
            counts = (input_ids == self.config.eoi_token_id).sum(1).tolist()
            groups = torch.arange(sum(counts)).split(counts)
            order = torch.cat([group for group in groups for _ in range(expand_size)])
            images = {name: value if value is None else value[order] for name, value in images.items()}
        # Done here, since transformers 5.17 repeats along the axis of coordinates and not along that of rows.
        position_ids = kwargs.pop("position_ids", None)
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=-2)
        return input_ids, kwargs | {name: value for name, value in images.items() if value is not None}

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
        """Continue prompts of text with continuous batching, as [`~transformers.GenerationMixin.generate_batch`].

        Raises:
            ValueError: for prompts that hold images, are padded, or take more positions than the model has.
        """
        images = [name for name in IMAGE_INPUTS if kwargs.get(name) is not None]
        if images:
            raise ValueError(f"Continuous batching reads no images, got {', '.join(images)}; call generate.")
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise ValueError("Continuous batching takes rows without padding; pass lists to generate_batch.")
        for input_ids in inputs:
            self._check_request(input_ids, kwargs.get("max_new_tokens"))
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """As [`~transformers.GenerationMixin.init_continuous_batching`], for requests of text."""
        manager = super().init_continuous_batching(*args, **kwargs)
        add_request = type(manager).add_request

        def add_text(input_ids, request_id=None, max_new_tokens=None, **options):
            self._check_request(input_ids, max_new_tokens)
            return add_request(manager, input_ids, request_id, max_new_tokens, **options)

        manager.add_request = add_text
        return manager

    def _check_request(self, input_ids: Sequence[int], max_new_tokens: int | None):
        if self.config.eoi_token_id in input_ids or self.config.image_token_id in input_ids:
            raise ValueError("Continuous batching reads no images, and a prompt holds some; call generate.")
        check_num_positions(len(input_ids) + (max_new_tokens or 0), self.config)
