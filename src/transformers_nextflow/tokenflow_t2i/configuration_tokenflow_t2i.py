"""Configuration of TokenFlow-t2i, NextFlow's nearest relative with public weights (arXiv 2412.03069)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig

from ..configuration_nextflow import NextFlowVQConfig, check_backbone, config_from, value_errors
from ..scale_schedule import ScaleSchedule
from ..utils.atomic_files import atomic_save


@value_errors
@strict
class TokenFlowT2IConfig(PreTrainedConfig):
    r"""Configuration of [`TokenFlowT2IForConditionalGeneration`].

    The defaults are those of the 7B model; of its vision tokenizer, which has a separate config, only the scales.

    Args:
        text_config: a `LlamaConfig` or dict; the backbone. Its vocabulary holds the codes too.
        vq_config: a [`NextFlowVQConfig`] or dict; the vision tokenizer. Images have the size of its largest square.
        image_token_start: token of the first code; the others follow it.
        qk_norm_eps: epsilon of the norms of queries and keys.
        image_sampling: settings of the scale loop, as arguments of [`RefinedImageSampling`].
        released_config: the config from which the model was converted, needed to convert it back.
    """

    model_type = "tokenflow_t2i"
    save_pretrained = atomic_save(PreTrainedConfig.save_pretrained)
    sub_configs = {"text_config": LlamaConfig, "vq_config": NextFlowVQConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    text_config: Any = None
    vq_config: Any = None
    image_token_start: int = 32001
    qk_norm_eps: float = 1e-6
    image_sampling: dict[str, Any] | None = None
    released_config: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        # Llama-2-7B with a padding token and the codes.
        text = {"vocab_size": 32001 + 32768, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
        vq = {"scales": (1, 2, 4, 6, 8, 10, 12, 14, 16)}
        for name, default in (("text_config", text), ("vq_config", vq)):
            value = default if getattr(self, name) is None else getattr(self, name)
            setattr(self, name, config_from(value, name, self.sub_configs[name]))
        if self.image_sampling is None:
            # The settings of the released script, whose guidance of 7.5 counts from the conditional side.
            self.image_sampling = {"guidance_scale": 8.5, "guidance_ramp": True, "top_k": 600, "top_p": 0.6}
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises `ValueError` for values that do not fit together."""
        check_backbone(self.text_config)
        stop, size = self.image_token_start + self.vq_config.codebook_size, self.text_config.vocab_size
        if self.image_token_start < 1 or stop > size:
            raise ValueError(
                f"The codes' tokens, {self.image_token_start} to {stop - 1}, lie outside the vocabulary of {size}; "
                "text_config.vocab_size counts text, padding and codes."
            )
        if self.qk_norm_eps <= 0:
            raise ValueError(f"qk_norm_eps must be positive, got {self.qk_norm_eps}.")

    @property
    def schedule(self) -> ScaleSchedule:
        """The one schedule of the model's images."""
        return self.vq_config.scale_schedules.build()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the model's images."""
        side = self.vq_config.image_size
        return self.schedule.image_size(self.vq_config.patch_size) if side is None else (side, side)
