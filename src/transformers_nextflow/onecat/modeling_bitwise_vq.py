"""Infinity's bitwise vision tokenizer: codes are the signs of residuals, scale by scale."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel  # noqa: F401 - diffusers looks for it beside a component's class

from ..configuration_nextflow import NORM_GROUPS
from ..modeling_nextflow_vq import (
    NextFlowVQEncoderOutput,
    NextFlowVQPreTrainedModel,
    leave_out_of_sharding,
)
from ..scale_schedule import ScaleSchedule
from ..vision_tokenizer.multiscale_quantizer import check_float32, without_autocast
from ..vision_tokenizer.resampling import resample
from .configuration_onecat import BitwiseVQConfig


class BitwiseQuantizer(nn.Module):
    """Turns latents (B, bits, h, w) into codes and back, in float32. A code is a whole number; bit 0 is the most
    significant one.

    Each scale takes the signs of the residual of the scales before; there are no learned weights.
    """

    def __init__(self, config: BitwiseVQConfig):
        super().__init__()
        self.config = config

    def to_bits(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Codes (…) → bits (…, code_bits), int64."""
        return image_tokens[..., None] >> self._places(image_tokens.device) & 1

    def to_tokens(self, bits: torch.Tensor) -> torch.Tensor:
        """Bits (…, code_bits) → codes (…), int64."""
        return (bits.long() << self._places(bits.device)).sum(-1)

    def _places(self, device: torch.device) -> torch.Tensor:
        return torch.arange(self.config.code_bits - 1, -1, -1, device=device)

    def vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (B, h, w) → vectors (B, bits, h, w) of unit length, ± 1 / sqrt(bits)."""
        return (2.0 * self.to_bits(codes).movedim(-1, 1) - 1) * self.config.code_bits**-0.5

    @torch.no_grad()
    def encode(self, latents: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
        """Codes (B, N) of latents (B, bits, h, w)."""
        residual, tokens = latents.float(), []
        for grid in schedule.grids:
            codes = self.to_tokens((resample(residual, grid, "area") > 0).movedim(1, -1))
            residual = residual - resample(self.vectors(codes), schedule.final_grid, "bilinear")
            tokens.append(codes.flatten(1))
        return torch.cat(tokens, dim=1)

    def decode(self, image_tokens: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
        """The sum (B, bits, h, w) of the vectors of codes (B, n) of all scales, or of the first ones.

        Raises:
            ValueError: for codes out of range, or that do not fill whole scales.
        """
        if not bool(((image_tokens >= 0) & (image_tokens < self.config.codebook_size)).all()):
            raise ValueError(
                f"Codes run from 0 to {self.config.codebook_size - 1}, got {int(image_tokens.min())} to "
                f"{int(image_tokens.max())}."
            )
        grids = schedule.split(image_tokens)
        total = resample(self.vectors(grids[0]), schedule.final_grid, "bilinear")
        for codes in grids[1:]:
            total = total + resample(self.vectors(codes), schedule.final_grid, "bilinear")
        return total


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, added to the input."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), _conv(channels, out_channels)
        self.norm2, self.conv2 = _norm(out_channels), _conv(out_channels, out_channels)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden_states)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (self.nin_shortcut(hidden_states) if hasattr(self, "nin_shortcut") else hidden_states)


class BitwiseEncoder(nn.Module):
    """Images (B, 3, H, W) → latents (B, bits, h, w). Names are the released ones."""

    def __init__(self, config: BitwiseVQConfig):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in, self.down = _conv(3, widths[0]), nn.ModuleList()
        for index, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            level = nn.Module()
            level.block = _blocks(before, width, config.num_res_blocks)
            if index < len(widths) - 1:
                level.downsample = nn.Conv2d(width, width, 3, stride=2)
            self.down.append(level)
        self.mid = nn.ModuleDict({name: ResidualBlock(widths[-1], widths[-1]) for name in ("block_1", "block_2")})
        self.norm_out, self.conv_out = _norm(widths[-1]), _conv(widths[-1], config.code_bits)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(pixel_values)
        for level in self.down:
            hidden_states = level.block(hidden_states)
            if hasattr(level, "downsample"):
                hidden_states = level.downsample(F.pad(hidden_states, (0, 1, 0, 1)))
        for block in self.mid.values():
            hidden_states = block(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class BitwiseDecoder(nn.Module):
    """Sums of code vectors (B, bits, h, w) → images (B, 3, H, W), not clamped."""

    def __init__(self, config: BitwiseVQConfig):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = _conv(config.code_bits, widths[-1])
        self.mid = nn.ModuleDict({name: ResidualBlock(widths[-1], widths[-1]) for name in ("block_1", "block_2")})
        self.up = nn.ModuleList()  # in the order of the released names: the full resolution, which runs last, is first
        for index, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]])):
            level = nn.Module()
            level.block = _blocks(before, width, config.num_res_blocks + 1)
            if index > 0:
                level.upsample = _conv(width, width)
            self.up.append(level)
        self.norm_out, self.conv_out = _norm(widths[0]), _conv(widths[0], 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(features)
        for block in self.mid.values():
            hidden_states = block(hidden_states)
        for level in reversed(self.up):
            hidden_states = level.block(hidden_states)
            if hasattr(level, "upsample"):
                hidden_states = level.upsample(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def _conv(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1)


def _blocks(channels: int, width: int, count: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, width), *(ResidualBlock(width, width) for _ in range(count - 1)))


class BitwiseVQModel(NextFlowVQPreTrainedModel):
    """Encoder, quantiser, decoder.

    >>> codes = model.encode(pixel_values).image_tokens
    >>> pixels = model.decode(codes, model.schedule_of(pixel_values))
    """

    config: BitwiseVQConfig
    card_title, card_origin = "Bitwise vision tokenizer", "Infinity's, not yet verified on the released weights"
    code_parts = ("encoder",)
    _no_split_modules = ["ResidualBlock"]
    _keep_in_fp32_modules_strict = ["encoder"]
    _keep_in_fp32_modules = ["encoder"]

    def __init__(self, config: BitwiseVQConfig):
        super().__init__(config)
        self.encoder, self.decoder = BitwiseEncoder(config), BitwiseDecoder(config)
        self.quantizer = BitwiseQuantizer(config)
        self.keep_codes_in_float32()
        self.post_init()

    def schedule_of(self, pixel_values: torch.Tensor) -> ScaleSchedule:
        """The schedule of images (B, 3, H, W). Raises `ValueError` for a size that no schedule draws."""
        return self.config.scale_schedules.for_size(*pixel_values.shape[-2:])

    @without_autocast
    def encode_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Latents (B, bits, h, w) of images (B, 3, H, W) in [-1, 1], in float32. Raises `ValueError` for other ones."""
        check_float32(self.encoder)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not bool(pixel_values.isfinite().all()):
            raise ValueError(
                f"pixel_values must be finite, (batch, 3, height, width), got {tuple(pixel_values.shape)}."
            )
        self.schedule_of(pixel_values)
        return self.encoder(pixel_values.float())

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> NextFlowVQEncoderOutput:
        """Codes (B, N) of images (B, 3, H, W) in [-1, 1] of one size that a schedule draws."""
        tokens = self.quantizer.encode(self.encode_latents(pixel_values), self.schedule_of(pixel_values))
        return NextFlowVQEncoderOutput(tokens, tokens, tokens)

    def decode(self, image_tokens: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] from codes (B, n) of all scales, or of the first ones (a preview)."""
        features, size = self.quantizer.decode(image_tokens, schedule), self.decoder.conv_in.weight.element_size()
        return self.decode_in_parts(features, self.config.channels, schedule, size)

    def decode_features(self, features: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W), not clamped, from a sum of code vectors (B, bits, h, w)."""
        return self.decoder(features.to(self.decoder.conv_in.weight.dtype)).float()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1], encoded and decoded."""
        return self.decode(self.encode(pixel_values).image_tokens, self.schedule_of(pixel_values))


def frozen_bitwise_tokenizer(config: BitwiseVQConfig) -> BitwiseVQModel:
    """The frozen tokenizer of a model; FSDP does not shard it."""
    vq_model = BitwiseVQModel._from_config(config).requires_grad_(False)
    leave_out_of_sharding(vq_model, True)
    return vq_model
