"""Configurations of NextFlow's vision tokenizer and of the model around it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, Qwen2_5_VLTextConfig
from transformers.activations import ACT2FN

from .scale_schedule import SQUARE_SIDES, ScaleSchedules, schedules_of
from .utils.atomic_files import atomic_save
from .utils.short_repr import short_repr
from .utils.training_domain import TrainingDomain
from .utils.typed_values import check_finite, check_types, is_of_type, read_typed


RESAMPLINGS = ("area", "bicubic", "bilinear", "nearest", "rotary")
CHOICES = {
    "downsample": RESAMPLINGS,
    "upsample": RESAMPLINGS,
    "pixel_encoder_type": ("convolutional", "patch"),
    "semantic_decoder_positions": ("sinusoidal", "learned"),
}


FROM_ONE = (
    "codebook_size", "semantic_code_dim", "pixel_code_dim", "pixel_channels", "pixel_latent_dim",
    "pixel_decoder_channels", "semantic_decoder_heads", "semantic_target_dim",
)  # fmt: skip
# Each layer is a module: a config with more layers would fill the memory before the model is built.
MAX_LAYERS = 1000
# More channels rather fill the memory than are meant.
MAX_CHANNELS = 2**20
LAYERS = ("pixel_num_res_blocks", "pixel_decoder_num_res_blocks", "semantic_decoder_depth")
FROM_ZERO = (
    "pixel_num_res_blocks", "pixel_decoder_num_res_blocks", "semantic_decoder_depth", "semantic_distance_weight",
    "pixel_distance_weight", "commitment_weight", "initializer_range",
)  # fmt: skip
TEXT_FROM_ONE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
# Of the group norms between convolutions; fewer channels have one group each.
NORM_GROUPS = 32
# The value that transformers uses if a config gives none.
MROPE_SECTION = (16, 24, 24)


def value_errors(config_class: type) -> type:
    """A config class that raises one-line `ValueError`s for values whose types differ from its annotations (`strict`
    does not read postponed annotations), and for all that `strict` itself refuses.
    """
    init, assign, load = config_class.__init__, config_class.__setattr__, config_class.from_dict.__func__
    hints = inspect.get_annotations(config_class, eval_str=True)

    @contextmanager
    def checked(values: dict[str, Any]):
        try:
            check_types(values, hints, config_class.__name__)
            yield
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error

    @wraps(init)
    def checked_init(self, *args, **kwargs):
        with checked(kwargs):
            try:
                init(self, *args, **kwargs)
            except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
                raise ValueError(f"{config_class.__name__} cannot be created from these values: {error}") from error

    @wraps(assign)
    def checked_assign(self, name: str, value: Any):
        with checked({name: value}):
            assign(self, name, value)

    @wraps(load)
    def checked_load(cls, config_dict: dict[str, Any], **kwargs):
        loaded = load(cls, config_dict, **kwargs)
        with checked({}):  # arguments beside the file were set one by one; the whole is checked here
            (loaded[0] if isinstance(loaded, tuple) else loaded).validate()
        return loaded

    config_class.__init__, config_class.__setattr__ = checked_init, checked_assign
    config_class.from_dict = classmethod(checked_load)
    return config_class


def config_from(value: Any, name: str, config_class: type) -> Any:
    """A config from a dict, or a config unchanged. Raises `ValueError` naming it for anything else."""
    if isinstance(value, dict):
        layers = value.get("num_hidden_layers")
        if isinstance(layers, int) and layers > MAX_LAYERS:  # transformers makes a list of as many entries
            raise ValueError(f"{name}.num_hidden_layers must be at most {MAX_LAYERS}, got {layers}.")
        return config_class(**value)
    if not isinstance(value, config_class):
        raise ValueError(f"{name} must be a {config_class.__name__} or its values, got {short_repr(value)}.")
    return value


def _check_at_least(config: PreTrainedConfig, least: int, names: Sequence[str], prefix: str = ""):
    for name in names:
        value = getattr(config, name)
        if not least <= value < float("inf"):
            raise ValueError(f"{prefix}{name} must be at least {least}, got {value}.")


def _check_layers(config: PreTrainedConfig, names: Sequence[str], prefix: str = ""):
    for name in names:
        if getattr(config, name) > MAX_LAYERS:
            raise ValueError(f"{prefix}{name} must be at most {MAX_LAYERS}, got {getattr(config, name)}.")


def _check_activation(name: str, value: str):
    if value not in ACT2FN:
        raise ValueError(f"{name} {value!r} is not an activation of transformers; use gelu_pytorch_tanh or silu.")


def check_backbone(text: PreTrainedConfig):
    """Raises `ValueError` for a `text_config` from which no model can be built."""
    _check_at_least(text, 1, TEXT_FROM_ONE, "text_config.")
    _check_layers(text, ("num_hidden_layers",), "text_config.")
    _check_at_least(text, 0, ("initializer_range",), "text_config.")
    _check_activation("text_config.hidden_act", text.hidden_act)
    if text.hidden_size % text.num_attention_heads or text.num_attention_heads % text.num_key_value_heads:
        raise ValueError(
            f"text_config.hidden_size {text.hidden_size}, num_attention_heads {text.num_attention_heads} and "
            f"num_key_value_heads {text.num_key_value_heads} must each be a multiple of the next."
        )
    layer_types = getattr(text, "layer_types", None)  # Llama's config has none
    if layer_types is not None and len(layer_types) != text.num_hidden_layers:
        raise ValueError(
            f"text_config.layer_types names {len(layer_types)} layers, but num_hidden_layers is "
            f"{text.num_hidden_layers}."
        )
    theta = text.rope_parameters.get("rope_theta", 1.0)
    if not is_of_type(theta, float) or not theta > 0:
        raise ValueError(f"text_config.rope_parameters: rope_theta must be a number above 0, got {short_repr(theta)}.")


@value_errors
@strict
class NextFlowVQConfig(PreTrainedConfig):
    r"""Configuration of [`NextFlowVQModel`], the dual-codebook multi-scale tokenizer (paper, section 2.1).

    The defaults are those of the large model: SigLIP2 NaFlex as semantic encoder, a convolutional pixel branch, 32,768
    codes.

    Args:
        semantic_config: any vision tower of transformers (SigLIP2 NaFlex, SigLIP, CLIP, …) as config or dict.
        semantic_layer: the layer whose hidden states are the features: -1 for the last, after the tower's closing
            norm, or an earlier one without the norm, such as -2.
        patch_size: pixels per side of a cell of the finest grid.
        image_size: side in pixels of square images, the only ones that are then encoded and decoded, if it differs from
            the side of the finest grid. The semantic encoder reads them unchanged, the pixel branch resized to the
            grid.
        scales: sides of the square grids, coarse to fine.
        levels: `[resolution, number of scales]` pairs; default one level with all scales.
        codebook_size: number of codes; semantic and pixel codebook share the index.
        semantic_code_dim, pixel_code_dim: widths of the two codebooks.
        semantic_distance_weight, pixel_distance_weight: weights of the two squared distances that pick a code.
        normalize_codes: normalise both halves to unit length before they are compared (TokenFlow); else the distances
            are Euclidean.
        downsample, upsample: how the residual is downsampled to a scale, and its codes upsampled again: torch's modes,
            or "rotary", with which a coarse code keeps what lies where (see `resample_rotary`).
        pixel_encoder_type: "convolutional" (VQGAN's kind) or "patch" (matrix products, fast on small machines).
        pixel_channels, pixel_channel_multipliers, pixel_num_res_blocks, pixel_latent_dim: the pixel encoder. The patch
            kind has width `pixel_channels` and `pixel_num_res_blocks` blocks.
        pixel_decoder_channels, pixel_decoder_num_res_blocks: the pixel decoder; doubling the first gives the paper's
            decoder of double capacity.
        semantic_decoder_depth, semantic_decoder_heads, semantic_decoder_hidden_size, semantic_decoder_hidden_act: the
            semantic decoder, a ViT.
        semantic_decoder_positions: "sinusoidal", for any grid, or "learned", with a class token, for the square one.
        semantic_target_dim: width of the features that the semantic decoder reproduces.
        commitment_weight: weight of the commitment loss, which moves the encoder's latents towards the codes.
    """

    model_type = "nextflow_vq"
    save_pretrained = atomic_save(PreTrainedConfig.save_pretrained)
    base_config_key = "vq_config"
    sub_configs = {"semantic_config": AutoConfig}

    semantic_config: Any = None
    semantic_layer: int = -1
    patch_size: int = 16
    image_size: int | None = None
    scales: list[int] | tuple[int, ...] = SQUARE_SIDES
    levels: list[Any] | tuple[Any, ...] | None = None
    codebook_size: int = 32768
    semantic_code_dim: int = 32
    pixel_code_dim: int = 8
    semantic_distance_weight: float = 1.0
    pixel_distance_weight: float = 1.0
    normalize_codes: bool = True
    downsample: str = "area"
    upsample: str = "bicubic"
    pixel_encoder_type: str = "convolutional"
    pixel_channels: int = 128
    pixel_channel_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    pixel_num_res_blocks: int = 2
    pixel_latent_dim: int = 256
    pixel_decoder_channels: int = 128
    pixel_decoder_num_res_blocks: int = 3
    semantic_decoder_depth: int = 3
    semantic_decoder_heads: int = 12
    semantic_decoder_hidden_size: int = 768
    semantic_decoder_hidden_act: str = "gelu_pytorch_tanh"
    semantic_decoder_positions: str = "sinusoidal"
    semantic_target_dim: int = 1152
    commitment_weight: float = 0.25
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.semantic_config is None:
            self.semantic_config = {
                "model_type": "siglip2_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "patch_size": 16,
                "num_patches": 256,
            }
        if isinstance(self.semantic_config, dict):
            semantic = dict(self.semantic_config)
            if not isinstance(semantic.get("model_type"), str):
                raise ValueError("semantic_config has no model_type; name one of transformers' vision towers.")
            self.semantic_config = AutoConfig.for_model(semantic.pop("model_type"), **semantic)
        self.semantic_config = config_from(self.semantic_config, "semantic_config", PreTrainedConfig)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises `ValueError` for values that do not fit together, and for numbers that are not finite."""
        check_finite(vars(self) | {"semantic_config": vars(self.semantic_config)})
        _check_at_least(self, 1, FROM_ONE)
        _check_at_least(self, 0, FROM_ZERO)
        _check_layers(self, LAYERS)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        layers = getattr(self.semantic_config, "num_hidden_layers", None)
        if layers is not None:
            _check_at_least(self.semantic_config, 0, ("num_hidden_layers",), "semantic_config.")
            _check_layers(self.semantic_config, ("num_hidden_layers",), "semantic_config.")
        if layers is not None and not -layers - 1 <= self.semantic_layer <= -1:
            raise ValueError(
                f"semantic_layer counts from the last of {layers} layers, -1, to the embeddings, {-layers - 1}; "
                f"got {self.semantic_layer}."
            )
        self.scale_schedules  # raises for invalid scales and levels
        self._check_tower()
        if self.pixel_encoder_type == "convolutional":
            self._check_convolutions()
        _check_activation("semantic_decoder_hidden_act", self.semantic_decoder_hidden_act)
        if self.semantic_decoder_hidden_size < 1 or self.semantic_decoder_hidden_size % self.semantic_decoder_heads:
            raise ValueError(
                f"semantic_decoder_hidden_size {self.semantic_decoder_hidden_size} is not a multiple of "
                f"semantic_decoder_heads {self.semantic_decoder_heads}."
            )

    def _check_tower(self):
        tower = self.semantic_config
        if not hasattr(type(tower), "patch_size") or not hasattr(tower, "num_attention_heads"):
            raise ValueError(f"semantic_config is a {tower.model_type}, which is not a vision tower with patches.")
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size", "image_size"):
            value = getattr(tower, name, 1)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"semantic_config.{name} must be a whole number from 1, got {short_repr(value)}.")
        if tower.hidden_size % tower.num_attention_heads:
            raise ValueError(
                f"semantic_config.hidden_size {tower.hidden_size} is not a multiple of its num_attention_heads "
                f"{tower.num_attention_heads}."
            )
        if getattr(tower, "num_channels", 3) != 3 or getattr(tower, "image_size", tower.patch_size) < tower.patch_size:
            raise ValueError("semantic_config must read 3 channels, and images of at least one patch.")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {self.image_size}.")
        if self.image_size is not None and self.image_size // tower.patch_size != self.scales[-1]:
            raise ValueError(
                f"image_size {self.image_size} gives {self.image_size // tower.patch_size} patches of "
                f"semantic_config.patch_size {tower.patch_size} a side, but the finest grid has {self.scales[-1]}."
            )

    def _check_convolutions(self):
        if 2 ** (len(self.pixel_channel_multipliers) - 1) != self.patch_size:
            raise ValueError(
                f"{len(self.pixel_channel_multipliers)} pixel_channel_multipliers downsample an image by "
                f"{2 ** (len(self.pixel_channel_multipliers) - 1)}, but patch_size is {self.patch_size}."
            )
        for name in ("pixel_channels", "pixel_decoder_channels"):
            for multiplier in self.pixel_channel_multipliers:
                width = getattr(self, name) * multiplier
                if width < 1 or (width > NORM_GROUPS and width % NORM_GROUPS):
                    raise ValueError(
                        f"{name} {getattr(self, name)} times {multiplier} of pixel_channel_multipliers gives {width} "
                        f"channels, which are normalised in {NORM_GROUPS} groups; use a multiple of {NORM_GROUPS}."
                    )

    @property
    def code_dim(self) -> int:
        return self.semantic_code_dim + self.pixel_code_dim

    @property
    def scale_schedules(self) -> ScaleSchedules:
        return schedules_of(self)


@value_errors
@strict
class NextFlowConfig(PreTrainedConfig):
    r"""Configuration of [`NextFlowForConditionalGeneration`].

    The text vocabulary (`text_config.vocab_size`) counts `<boi>`, `<eoi>` and the placeholder of image slots; the
    codes of the tokenizer follow it in the output, and have their own input embeddings.

    Args:
        text_config: a `Qwen2_5_VLTextConfig` or dict; the backbone.
        vq_config: a [`NextFlowVQConfig`] or dict; the vision tokenizer.
        boi_token_id, eoi_token_id: tokens that open and close an image.
        image_token_id: what `input_ids` hold in the slots of an image.
        read_last_scale: read the codes of the last scale too, in one more grid of slots that predicts nothing.
        accumulate_features: slots read the sum over all earlier scales (as in VAR) instead of only the scale before.
        rope_range: the range of the spatial coordinates of a square image, the paper's constant C (section 2.2).
        scale_loss_alpha: a token of an h x w grid has the weight (h*w)^-alpha in the loss (section 3.1).
        trained_on: what the checkpoint was trained on, as the values of a `TrainingDomain`: a pipeline warns of prompts
            and images unlike it. Training the model further removes it.
    """

    model_type = "nextflow"
    save_pretrained = atomic_save(PreTrainedConfig.save_pretrained)
    sub_configs = {"text_config": Qwen2_5_VLTextConfig, "vq_config": NextFlowVQConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    text_config: Any = None
    vq_config: Any = None
    boi_token_id: int = 152064
    eoi_token_id: int = 152065
    image_token_id: int = 151655
    read_last_scale: bool = False
    accumulate_features: bool = False
    # At the finest grid of the 1024 level neighbours are one apart, as Qwen2.5-VL's image patches are.
    rope_range: float = 64.0
    scale_loss_alpha: float = 0.9
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    trained_on: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        # The default vocabulary is Qwen2.5-VL's with <boi> and <eoi>.
        defaults = {"text_config": {"vocab_size": 152066}, "vq_config": {}}
        for name, config_class in self.sub_configs.items():
            value = defaults[name] if getattr(self, name) is None else getattr(self, name)
            setattr(self, name, config_from(value, name, config_class))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises `ValueError` for values that do not fit together, and for numbers that are not finite."""
        check_finite(vars(self) | {"text_config": vars(self.text_config)})
        for name in ("boi_token_id", "eoi_token_id", "image_token_id"):
            if not 0 <= getattr(self, name) < self.text_config.vocab_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} lies outside the text vocabulary of {self.text_config.vocab_size}; "
                    "text_config.vocab_size counts <boi>, <eoi> and the placeholder."
                )
        if len({self.boi_token_id, self.eoi_token_id, self.image_token_id}) < 3:
            raise ValueError("boi_token_id, eoi_token_id and image_token_id must differ.")
        _check_at_least(self, 0, ("rope_range", "initializer_range"))
        if self.rope_range == 0:
            raise ValueError(f"rope_range must be positive, got {self.rope_range}.")
        if set(self.text_config.layer_types) - {"full_attention"}:
            raise ValueError(
                f"text_config.layer_types are {sorted(set(self.text_config.layer_types))}, but the scales of an image "
                "need full_attention in every layer; set text_config.use_sliding_window to False."
            )
        if self.trained_on is not None:
            read_typed(TrainingDomain, self.trained_on, "trained_on")
        check_backbone(self.text_config)
        frequencies = self.text_config.hidden_size // self.text_config.num_attention_heads // 2
        sections = self.text_config.rope_parameters.get("mrope_section", MROPE_SECTION)
        if not is_of_type(sections, tuple[int, ...]):
            raise ValueError(
                f"text_config.rope_parameters: mrope_section must hold whole numbers, got {short_repr(sections)}."
            )
        if sum(sections) != frequencies:
            raise ValueError(
                f"mrope_section {list(sections)} has {sum(sections)} frequencies, but heads of "
                f"{2 * frequencies} channels have {frequencies}; correct text_config.rope_parameters."
            )

    @property
    def vocab_size(self) -> int:
        """Classes of the output: text, then codes."""
        return self.text_config.vocab_size + self.vq_config.codebook_size

    @classmethod
    def nextflow_7b(cls) -> NextFlowConfig:
        """The paper's model: the backbone of Qwen2.5-VL-7B, 32,768 codes, the 256, 512 and 1024 levels.

        A model that starts from Qwen2.5-7B or Qwen2.5-VL-7B is under Apache-2.0.
        """
        return cls._after_qwen(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, max_position_embeddings=128000,
        )  # fmt: skip

    @classmethod
    def nextflow_3b(cls) -> NextFlowConfig:
        """The backbone of Qwen2.5-3B and Qwen2.5-VL-3B; all else is as in `nextflow_7b`.

        A model that starts from either is under the Qwen Research License, which allows no commercial use; a model that
        starts from random weights is not.
        """
        return cls._after_qwen(
            hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip

    @classmethod
    def nextflow_1_5b(cls) -> NextFlowConfig:
        """The backbone of Qwen2.5-1.5B; all else is as in `nextflow_7b`. A model that starts from it is under
        Apache-2.0.
        """
        return cls._after_qwen(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip

    @classmethod
    def nextflow_0_5b(cls) -> NextFlowConfig:
        """The backbone of Qwen2.5-0.5B; all else is as in `nextflow_7b`. A model that starts from it is under
        Apache-2.0.
        """
        return cls._after_qwen(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True, mrope_section=(8, 12, 12),
        )  # fmt: skip

    @classmethod
    def _after_qwen(cls, tie_word_embeddings: bool = False, mrope_section=MROPE_SECTION, **sizes) -> NextFlowConfig:
        """The paper's tokenizer and levels with a backbone of these sizes; the vocabulary is the same for all sizes."""
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(mrope_section)}
        sizes = {"vocab_size": 152066, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6} | sizes
        return cls(
            text_config=Qwen2_5_VLTextConfig(rope_parameters=rope, **sizes),
            vq_config=NextFlowVQConfig(levels=[[256, 12], [512, 16], [1024, 18]]),
            tie_word_embeddings=tie_word_embeddings,
        )
