"""NextFlow's vision tokenizer: pixels to codes to pixels, with a dual codebook (paper, section 2.1; TokenFlow)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_nextflow import NextFlowVQConfig
from .scale_schedule import Grid, ScaleSchedule
from .utils.atomic_files import atomic_save
from .utils.folder_parts import pipeline_errors
from .utils.model_cards import TOKENIZER_USE, ModelCardMixin, with_card
from .utils.offloading import ExecutionDeviceMixin
from .utils.strict_loading import StrictLoadingMixin
from .vision_tokenizer.fingerprint import CODE_PARTS
from .vision_tokenizer.multiscale_quantizer import (
    NextFlowVQQuantizer,
    SelfCorrection,
    check_float32,
    without_autocast,
)
from .vision_tokenizer.pixel_branches import PIXEL_BRANCHES
from .vision_tokenizer.resampling import resample
from .vision_tokenizer.semantic_branches import LearnedPositions, SemanticDecoder, read_semantics


@dataclass
class NextFlowVQEncoderOutput(ModelOutput):
    """Codes of a batch of images of one size.

    Args:
        image_tokens: (B, N) int64 codes, coarse to fine, each grid row-major: the codes that the transformer reads.
        image_labels: (B, N) int64 nearest codes, which it learns to predict.
        image_clean_tokens: (B, N) int64 codes of the images themselves, which it reads of images that are not trained
            on. All three are equal unless codes were sampled for self-correction.
    """

    image_tokens: torch.LongTensor | None = None
    image_labels: torch.LongTensor | None = None
    image_clean_tokens: torch.LongTensor | None = None


@dataclass
class NextFlowVQOutput(ModelOutput):
    """Outputs of the tokenizer that a training step needs.

    Args:
        reconstruction: (B, 3, H, W) in about [-1, 1].
        semantic_features: (B, h, w, D) prediction of the teacher's features.
        latents: (B, C, h, w) before quantisation, the semantic channels first.
        image_tokens: (B, N) int64 codes; `None` without quantisation.
        codebook_loss, commitment_loss: scalars, averaged over scales; zero without quantisation.
    """

    reconstruction: torch.FloatTensor | None = None
    semantic_features: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    image_tokens: torch.LongTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None


# Memory that several images at once may take beside the weights, and how many of the largest tensors exist at once.
BYTES_AT_ONCE = 3 * 2**29
TENSORS_AT_ONCE = 5


class NextFlowVQPreTrainedModel(ModelCardMixin, StrictLoadingMixin, ExecutionDeviceMixin, PreTrainedModel):
    """What vision tokenizers share: loading, placement on devices, and initial weights."""

    config: NextFlowVQConfig
    save_pretrained = with_card(atomic_save(PreTrainedModel.save_pretrained))
    card_title, card_pipeline_tag, card_use = "Vision tokenizer of NextFlow", None, TOKENIZER_USE
    base_model_prefix = "vq_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = [
        "CLIPEncoderLayer",
        "SiglipEncoderLayer",
        "Siglip2EncoderLayer",
        "ResidualConvolution",
        "ResidualMLP",
    ]
    _keep_in_fp32_modules_strict = list(CODE_PARTS)
    # Modules that are never quantised, whatever the config says.
    _keep_in_fp32_modules = list(CODE_PARTS)
    code_parts = CODE_PARTS

    def keep_codes_in_float32(self):
        """Cast the modules that decide about codes to float32, if they were made or loaded in another dtype."""
        for part in self.code_parts:
            getattr(self, part).float()

    def decode_in_parts(
        self, features: torch.Tensor, channels: int, schedule: ScaleSchedule, size: int
    ) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] from sums of code vectors (B, C, h, w), as many at once as fit into memory.

        On a CPU images are decoded one by one: there the order of additions in a matrix product depends on its number
        of rows, and an image must not depend on the other images of the batch, not even by a bit.

        Args:
            channels, size: channels of the pixel decoder and bytes of each of its weights, as in `images_at_once`.
        """
        at_once = 1 if features.device.type == "cpu" else images_at_once(self.config, channels, schedule, size)
        return torch.cat([self.decode_features(part).clamp(-1, 1) for part in features.split(at_once)])

    def _apply(self, fn, recurse=True):
        # A cast of the whole model, such as diffusers' `pipe.to("cuda", torch.bfloat16)`, moves these modules only.
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if tensor.dtype == torch.float32 != result.dtype else result

        for name, part in self.named_children() if recurse else ():
            part._apply(moved if name in self.code_parts else fn)
        return super()._apply(fn, recurse=False)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers would take any class of this file with "attention" in its name (VQGAN's) for one with backends.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, NextFlowVQQuantizer):
            for codebook in (module.semantic_codebook, module.pixel_codebook):
                init.normal_(codebook.weight)
        elif isinstance(module, LearnedPositions):
            init.normal_(module.class_token, std=self.config.initializer_range)
            init.normal_(module.positions, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class NextFlowVQModel(NextFlowVQPreTrainedModel):
    """Two encoders, two codebooks with one index, two decoders.

    >>> model = NextFlowForConditionalGeneration.from_pretrained("checkpoints/nextflow-shapes").vq_model
    >>> codes = model.encode(pixel_values).image_tokens
    >>> pixels = model.decode(codes, model.schedule_of(pixel_values))
    """

    def __init__(self, config: NextFlowVQConfig):
        super().__init__(config)
        semantic_dim = config.semantic_config.hidden_size
        self.semantic_encoder = AutoModel.from_config(config.semantic_config)
        self.semantic_projection = nn.Sequential(
            nn.Linear(semantic_dim, semantic_dim), nn.Tanh(), nn.Linear(semantic_dim, config.semantic_code_dim)
        )
        pixel_encoder, _ = PIXEL_BRANCHES[config.pixel_encoder_type]
        _, pixel_decoder = PIXEL_BRANCHES[config.pixel_decoder_type or config.pixel_encoder_type]
        self.pixel_encoder = pixel_encoder(config)
        self.quantizer = NextFlowVQQuantizer(config)
        self.pixel_decoder = pixel_decoder(config)
        self.semantic_decoder = SemanticDecoder(config)
        self.keep_codes_in_float32()
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers.

        Raises:
            ValueError: naming tensors that a checkpoint lacks, or for the folder of a whole model.
        """
        if kwargs.get("config") is None:
            # The config of a whole model contains a tokenizer's, so transformers would take that and look for the
            # weights.
            with pipeline_errors(pretrained_model_name_or_path, kwargs):
                found, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **kwargs)
            model_type = found.get("model_type")
            if model_type not in (None, cls.config_class.model_type):
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds a {model_type} model, not only a vision tokenizer; the "
                    "tokenizer of a NextFlow is taken out by transformers_nextflow.data.load_vision_tokenizer(folder)."
                )
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).keep_codes_in_float32()
        return loaded

    @property
    def _trains_encoders(self) -> bool:
        encoders = (self.semantic_encoder, self.semantic_projection, self.pixel_encoder)
        return self.training and any(p.requires_grad for encoder in encoders for p in encoder.parameters())

    def schedule_of(self, pixel_values: torch.Tensor) -> ScaleSchedule:
        """The schedule of images (B, 3, H, W). Raises `ValueError` for a size that no schedule draws."""
        size, only = tuple(pixel_values.shape[-2:]), self.config.image_size
        if only is None:
            return self.config.scale_schedules.for_size(*size)
        if size != (only, only):
            raise ValueError(f"This tokenizer reads only images of {only}x{only} pixels, got {size[0]}x{size[1]}.")
        return self.config.scale_schedules.build()

    @without_autocast
    def encode_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Continuous latents (B, C, h, w), the semantic channels first, computed in float32 also under autocast.

        Pixels in half precision, to which FSDP or `BatchFeature.to(dtype)` cast them, are rounded to the 8-bit values
        that they came from.

        Raises:
            ValueError: for another shape or size, values that are not finite, or weights that are not float32.
        """
        for part in CODE_PARTS:
            check_float32(getattr(self, part))
        return self._latents(pixel_values)

    def _latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The latents of `encode_latents`, in the precision of the surrounding autocast."""
        _check_pixels(pixel_values)
        schedule = self.schedule_of(pixel_values)
        if pixel_values.dtype in (torch.bfloat16, torch.float16):
            pixel_values = ((pixel_values.float() + 1) * 127.5).round() / 127.5 - 1
        pixel_values = pixel_values.float()
        semantic = self.encode_semantics(pixel_values, schedule.final_grid)
        semantic = self.semantic_projection(semantic).permute(0, 3, 1, 2)
        pixel_values = resample(pixel_values, schedule.image_size(self.config.patch_size), "bicubic")
        halves = [semantic.float(), self.pixel_encoder(pixel_values).float()]
        if not self.config.normalize_codes:
            # Euclidean distances need latents of a fixed norm, or the latents grow beyond the reach of the codebook.
            halves = [F.rms_norm(half.permute(0, 2, 3, 1), half.shape[1:2]).permute(0, 3, 1, 2) for half in halves]
        return torch.cat(halves, dim=1)

    def encode_semantics(self, pixel_values: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Features (B, h, w, D) of the semantic encoder on the grid, for any patch size of that encoder."""
        return read_semantics(self.semantic_encoder, self.config, pixel_values, grid)

    def encode(
        self,
        pixel_values: torch.Tensor,
        self_correction: SelfCorrection | None = None,
        generator: torch.Generator | None = None,
    ) -> NextFlowVQEncoderOutput:
        """Codes of images of one size.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1]; H and W must be a size of the scale schedules.
            self_correction: sample a part of the codes among the nearest ones; `image_labels` are then the codes
                nearest to the residuals that these leave. The images' own codes are `image_clean_tokens`.
            generator: source of the random numbers.

        Raises:
            ValueError: for another shape or size, or values that are not finite.
        """
        latents, schedule = self.encode_latents(pixel_values), self.schedule_of(pixel_values)
        clean = output = self.quantizer.encode(latents, schedule)
        if self_correction is not None:
            output = self.quantizer.encode(latents, schedule, self_correction, generator=generator)
        return NextFlowVQEncoderOutput(output.image_tokens, output.image_labels, clean.image_tokens)

    def decode(self, image_tokens: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] from codes (B, n) of all scales, or of the first ones (a preview)."""
        features = self.quantizer.decode(image_tokens, schedule)
        size = next(self.pixel_decoder.parameters()).element_size()
        return self.decode_in_parts(features, self.config.pixel_decoder_channels, schedule, size)

    def reconstruct(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1], encoded and decoded; their size must be one of the scale schedules."""
        return self.decode(self.encode(pixel_values).image_tokens, self.schedule_of(pixel_values))

    def decode_features(self, features: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W), not clamped, from a sum of code vectors (B, C, h, w)."""
        pixels = self.pixel_decoder(_as_weights_of(self.pixel_decoder, features[:, self.config.semantic_code_dim :]))
        pixels, size = pixels.float(), self.config.image_size
        return pixels if size is None else resample(pixels, (size, size), "bicubic")

    def decode_semantics(self, features: torch.Tensor) -> torch.Tensor:
        """The teacher's features (B, h, w, D) from a sum of code vectors (B, C, h, w)."""
        semantic = _as_weights_of(self.semantic_decoder, features[:, : self.config.semantic_code_dim])
        return self.semantic_decoder(semantic).float()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_scales: torch.Tensor | None = None,
        quantize: bool = True,
        latent_noise: float = 0.0,
    ) -> NextFlowVQOutput:
        """Encode and decode images (B, 3, H, W) in [-1, 1] with gradients.

        Under autocast encoders that are trained run in its precision; frozen encoders compute their codes in float32.

        Args:
            num_scales: (B,) how many of its first scales each image is decoded from (scale dropout).
            quantize: `False` trains the branches as plain autoencoders, before there is a codebook.
            latent_noise: standard deviation of the noise that is added to latents that are not quantised.
        """
        schedule = self.schedule_of(pixel_values)
        latents = (self._latents if self._trains_encoders else self.encode_latents)(pixel_values)
        zero = latents.new_zeros(())
        if quantize:
            output = self.quantizer.encode(latents, schedule, num_scales=num_scales)
            features, tokens = output.features, output.image_tokens
            codebook_loss, commitment_loss = output.codebook_loss, output.commitment_loss
        else:
            features, tokens, codebook_loss, commitment_loss = latents, None, zero, zero
            if num_scales is not None:
                features = self.quantizer.truncate(latents, schedule, num_scales)
            features = features + latent_noise * torch.randn_like(features)
        return NextFlowVQOutput(
            reconstruction=self.decode_features(features),
            semantic_features=self.decode_semantics(features),
            latents=latents,
            image_tokens=tokens,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
        )


def images_at_once(config: NextFlowVQConfig, channels: int, schedule: ScaleSchedule, size: int) -> int:
    """How many images a pixel branch with these channels, of `size` bytes each, processes at once: as many as fit into
    `BYTES_AT_ONCE`, at least one.
    """
    height, width = schedule.image_size(config.patch_size)
    elements = channels * height * width
    if "convolutional" not in (config.pixel_encoder_type, config.pixel_decoder_type):
        # Patches have channels only at the resolution of the cells.
        elements = 2 * channels * schedule.final_grid[0] * schedule.final_grid[1] + 3 * height * width
    return max(1, BYTES_AT_ONCE // (TENSORS_AT_ONCE * elements * size))


def frozen_vision_tokenizer(config: NextFlowVQConfig) -> NextFlowVQModel:
    """The frozen tokenizer of a model; as in the paper it is not trained with it, since codes must keep their meaning.

    FSDP does not shard it: FSDP's policy would round its weights, and they would only be gathered while the model
    itself is called.
    """
    vq_model = NextFlowVQModel._from_config(config).requires_grad_(False)
    leave_out_of_sharding(vq_model, True)
    return vq_model


def leave_out_of_sharding(module: nn.Module, left_out: bool):
    """Set whether FSDP skips a module when it shards the module around it, so that every process has all of it."""
    try:
        # The mark that torch sets on replicated modules; there is no public function for it.
        from torch.distributed._composable.contract import REGISTRY_KEY
    except ImportError:  # a torch without it, whose sharded weights `check_float32` refuses
        return
    module.__dict__[REGISTRY_KEY] = {"replicate": None} if left_out else {}


def codebook_statistics(image_tokens: torch.Tensor, schedule: ScaleSchedule, codebook_size: int) -> dict[str, float]:
    """The share of the codebook in use and the perplexity of the codes (B, N), over all scales and for each.

    The usage of a scale is a share of the whole codebook too, though a scale with few codes cannot use all of it.
    """

    def statistics(codes: torch.Tensor) -> tuple[float, float]:
        counts = torch.bincount(codes.flatten(), minlength=codebook_size).double()
        shares = counts / counts.sum()
        return float((counts > 0).double().mean()), float(torch.special.entr(shares).sum().exp())

    usage, perplexity = statistics(image_tokens)
    result = {"usage": usage, "perplexity": perplexity}
    for scale, codes in enumerate(schedule.split(image_tokens), start=1):
        result[f"usage_scale_{scale}"], result[f"perplexity_scale_{scale}"] = statistics(codes)
    return result


def _as_weights_of(decoder: nn.Module, features: torch.Tensor) -> torch.Tensor:
    return features.to(next(decoder.parameters()).dtype)


def _check_pixels(pixel_values: torch.Tensor):
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"pixel_values must be (batch, 3, height, width), got {tuple(pixel_values.shape)}.")
    if not torch.isfinite(pixel_values).all():
        raise ValueError("pixel_values hold NaN or infinite values; check the images they were made from.")
