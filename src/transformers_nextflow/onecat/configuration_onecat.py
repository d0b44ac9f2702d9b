"""Configurations of OneCAT and of its bitwise vision tokenizer, which is Infinity's."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen2Config

from ..configuration_nextflow import (
    MAX_CHANNELS,
    MAX_LAYERS,
    NORM_GROUPS,
    check_backbone,
    config_from,
    value_errors,
)
from ..generation.sampling import ImageSampling
from ..utils.atomic_files import atomic_save
from ..utils.typed_values import check_finite
from .schedules import MAX_SCALES, OneCatSchedules, checked_levels, schedules_of_levels


FREQUENCIES = ("float32", "bfloat16")


@value_errors
@strict
class BitwiseVQConfig(PreTrainedConfig):
    r"""Configuration of [`BitwiseVQModel`]. The defaults are those of Infinity's tokenizer of 32 bits.

    Args:
        code_bits: bits of a code, from 1 to 62: the signs of as many channels of the latents.
        levels: `[resolution, number of scales]` pairs, from OneCAT's tables.
        channels, channel_multipliers: widths of the levels of encoder and decoder, the full resolution first.
        num_res_blocks: residual blocks of a level of the encoder; the decoder has one more.
    """

    model_type = "bitwise_vq"
    base_config_key = "vq_config"
    save_pretrained = atomic_save(PreTrainedConfig.save_pretrained)
    # Read by the function that computes how many images are decoded at once.
    pixel_encoder_type = "convolutional"

    code_bits: int = 32
    levels: list[Any] | tuple[Any, ...] = ((512, 10), (1024, 13))
    channels: int = 128
    channel_multipliers: list[int] | tuple[int, ...] = (1, 2, 4, 4, 4)
    num_res_blocks: int = 2
    initializer_range: float = 0.02

    def validate_architecture(self):
        """Raises `ValueError` for values that do not fit together, and for numbers that are not finite."""
        check_finite(vars(self))
        # The sign bit and the value -1, which is padding, must stay free.
        if not 1 <= self.code_bits <= 62:
            raise ValueError(f"code_bits must be from 1 to 62, got {self.code_bits}.")
        if not 1 <= self.num_res_blocks <= MAX_LAYERS:
            raise ValueError(f"num_res_blocks must be from 1 to {MAX_LAYERS}, got {self.num_res_blocks}.")
        for multiplier in self.channel_multipliers:
            if not 1 <= (width := self.channels * multiplier) <= MAX_CHANNELS or width % NORM_GROUPS:
                raise ValueError(
                    f"channels {self.channels} times {multiplier} of channel_multipliers gives {width}, which is no "
                    f"multiple of the {NORM_GROUPS} groups of the norms, up to {MAX_CHANNELS}."
                )
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range must be at least 0, got {self.initializer_range}.")
        self.scale_schedules  # raises for levels that are none

    @property
    def patch_size(self) -> int:
        """Pixels per side of a cell of the last grid."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def codebook_size(self) -> int:
        return 2**self.code_bits

    @property
    def scale_schedules(self) -> OneCatSchedules:
        return schedules_of_levels(self.patch_size, checked_levels(self.levels))


@value_errors
@strict
class OneCatConfig(PreTrainedConfig):
    r"""Configuration of [`OneCatForConditionalGeneration`]. The defaults are those that we assume for the 3B model.

    Args:
        text_config: a `Qwen2Config` or dict; the backbone.
        vq_config: a [`BitwiseVQConfig`] or dict; the vision tokenizer.
        adapter_rank: rank of the drawing expert's adapter for one scale; there are 13 adapters.
        num_scale_embeddings: rows of the embedding of scales.
        reader_hidden_size, reader_image_size, reader_patch_size: the image encoder (`PatchReader`): its width, the side
            in pixels of the square that its table of positions covers, and pixels per side of a patch.
        image_token_id, reference_token_id: placeholders of input images in a chat and in an edit.
        drawing_frequencies: the dtype to which the rotary frequencies of drawings are rounded. The released scripts
            cast them to "bfloat16" with the model; "float32" leaves them exact. Chats always have exact ones.
        drawing_only: leave out the modules that only read images and write text, which takes a third less memory.
        image_sampling, editing_sampling: settings of the scale loop, as arguments of [`BitwiseImageSampling`] and
            [`BitwiseEditingSampling`].
        released_config: the config from which the model was converted, needed to convert it back.
    """

    model_type = "onecat"
    save_pretrained = atomic_save(PreTrainedConfig.save_pretrained)
    sub_configs = {"text_config": Qwen2Config, "vq_config": BitwiseVQConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    text_config: Any = None
    vq_config: Any = None
    adapter_rank: int = 64
    num_scale_embeddings: int = 15
    reader_hidden_size: int = 1024
    reader_image_size: int = 448
    reader_patch_size: int = 14
    image_token_id: int = 151667
    reference_token_id: int = 151671
    drawing_frequencies: str = "float32"
    drawing_only: bool = False
    image_sampling: dict[str, Any] | None = None
    editing_sampling: dict[str, Any] | None = None
    released_config: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if "llm_config" in kwargs:
            raise ValueError("This is OneCAT as it was released; convert it by conversion/convert_onecat.py first.")
        # Qwen2.5-3B.
        text = {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        }  # fmt: skip
        for name, default in (("text_config", text), ("vq_config", {})):
            value = default if getattr(self, name) is None else getattr(self, name)
            setattr(self, name, config_from(value, name, self.sub_configs[name]))
        if self.image_sampling is None:
            # The settings of the released scripts.
            self.image_sampling = {"guidance_scale": 20.0, "temperature": 0.5, "top_p": 0.97}
        if self.editing_sampling is None:
            # Their cfg of 3 for text, and of 1 for images, which is a strength of 3 / (1 + 1).
            self.editing_sampling = {
                "guidance_scale": 3.0, "image_guidance_scale": 1.5, "temperature": 0.5, "top_p": 0.97,
            }  # fmt: skip
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises `ValueError` for values that do not fit together, and for numbers that are not finite."""
        check_finite(vars(self) | {"text_config": vars(self.text_config)})
        text = self.text_config
        check_backbone(text)
        if self.head_dim % 8:
            raise ValueError(
                f"The width of a head must be a multiple of 8, whose quarters are rows and columns; {self.head_dim} is "
                "not."
            )
        for name in ("adapter_rank", "reader_hidden_size", "reader_patch_size"):
            if not 1 <= getattr(self, name) <= MAX_CHANNELS:
                raise ValueError(f"{name} must be from 1 to {MAX_CHANNELS}, got {getattr(self, name)}.")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range must be at least 0, got {self.initializer_range}.")
        if self.image_token_id == self.reference_token_id:
            raise ValueError(f"image_token_id and reference_token_id are two tokens, got {self.image_token_id} twice.")
        for name in ("image_sampling", "editing_sampling"):
            try:
                ImageSampling.from_dict(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        if self.num_scale_embeddings < MAX_SCALES:
            raise ValueError(f"num_scale_embeddings must be at least {MAX_SCALES}, got {self.num_scale_embeddings}.")
        if self.reader_image_size < self.reader_patch_size or self.reader_image_size % self.reader_patch_size:
            raise ValueError(
                f"reader_image_size {self.reader_image_size} is not a multiple of reader_patch_size "
                f"{self.reader_patch_size}."
            )
        if self.drawing_frequencies not in FREQUENCIES:
            raise ValueError(f"drawing_frequencies must be one of {FREQUENCIES}, got {self.drawing_frequencies!r}.")
        for name in ("image_token_id", "reference_token_id"):
            if not 0 <= getattr(self, name) < text.vocab_size:
                raise ValueError(f"{name} {getattr(self, name)} lies outside of the vocabulary of {text.vocab_size}.")

    @property
    def head_dim(self) -> int:
        return self.text_config.hidden_size // self.text_config.num_attention_heads
