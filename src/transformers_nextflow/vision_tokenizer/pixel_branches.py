"""Encoders and decoders of pixels: VQGAN's convolutions, or patches by matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..configuration_nextflow import NORM_GROUPS, NextFlowVQConfig
from .striped_convolutions import add_convolved, convolve, convolve_enlarged


# Tensors of a decoder that are larger than this are computed in stripes.
WHOLE_BYTES = 2**27


class ResidualMLP(nn.Module):
    """x + MLP(norm(x)) on (B, h, w, C): 1x1 convolutions as matrix products."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.contract(F.gelu(self.expand(self.norm(hidden_states)), approximate="tanh"))


class PatchEncoder(nn.Module):
    """Encodes patches with matrix products: each cell depends only on its own pixels. Fast on small machines."""

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.input_projection = nn.Linear(3 * config.patch_size**2, config.pixel_channels)
        self.blocks = nn.ModuleList(ResidualMLP(config.pixel_channels) for _ in range(config.pixel_num_res_blocks))
        self.output_projection = nn.Linear(config.pixel_channels, config.pixel_code_dim)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, pixel_code_dim, h, w)."""
        hidden_states = self.input_projection(F.pixel_unshuffle(pixel_values, self.patch_size).permute(0, 2, 3, 1))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.output_projection(hidden_states).permute(0, 3, 1, 2)


class PatchDecoder(nn.Module):
    """The decoder for `PatchEncoder`, with one 3x3 convolution that smooths the edges between patches."""

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        width = config.pixel_decoder_channels
        self.patch_size = config.patch_size
        self.input_projection = nn.Conv2d(config.pixel_code_dim, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualMLP(width) for _ in range(config.pixel_decoder_num_res_blocks))
        self.norm = nn.LayerNorm(width)
        self.output_projection = nn.Linear(width, 3 * config.patch_size**2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, pixel_code_dim, h, w) → (B, 3, H, W)."""
        hidden_states = self.input_projection(features).permute(0, 2, 3, 1)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        pixels = self.output_projection(self.norm(hidden_states)).permute(0, 3, 1, 2)
        return F.pixel_shuffle(pixels, self.patch_size)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(NORM_GROUPS, channels), channels, eps=1e-6)


class ResidualConvolution(nn.Module):
    """VQGAN's residual block: norm, SiLU, 3x3, twice."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = _group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        return residual + self.conv2(F.silu(self.norm2(hidden_states)))

    def by_stripes(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The forward pass without gradients, with two large tensors in memory; the input may be overwritten."""
        inner = convolve(hidden_states, self.conv1, self.norm1)
        residual = self.shortcut(hidden_states)
        add_convolved(residual, inner, self.conv2, self.norm2)
        return residual


class GridAttention(nn.Module):
    """VQGAN's self-attention with one head over all cells."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _group_norm(channels)
        self.query, self.key, self.value, self.output = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        grid = hidden_states.shape[-2:]
        normed = self.norm(hidden_states)
        query, key, value = (
            layer(normed).flatten(2).transpose(1, 2)[:, None] for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0].transpose(1, 2).unflatten(2, grid)
        return hidden_states + self.output(attended)


class ConvolutionalEncoder(nn.Module):
    """VQGAN's encoder, with attention only at the lowest resolution."""

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        widths = [config.pixel_channels * multiplier for multiplier in config.pixel_channel_multipliers]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        channels = widths[0]
        for level, width in enumerate(widths):
            lowest = level == len(widths) - 1
            for _ in range(config.pixel_num_res_blocks):
                layers += [ResidualConvolution(channels, width)] + [GridAttention(width)] * lowest
                channels = width
            if not lowest:
                # Pads right and bottom by one, so that cells stay aligned with their pixels.
                layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)]
        layers += [ResidualConvolution(channels, channels), GridAttention(channels)]
        layers += [ResidualConvolution(channels, channels), _group_norm(channels), nn.SiLU()]
        layers += [nn.Conv2d(channels, config.pixel_latent_dim, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        self.output_projection = nn.Conv2d(config.pixel_latent_dim, config.pixel_code_dim, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, pixel_code_dim, h, w)."""
        return self.output_projection(self.layers(pixel_values))


class ConvolutionalDecoder(nn.Module):
    """VQGAN's decoder; the double capacity of the paper's last stage is twice its channels."""

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        widths = [config.pixel_decoder_channels * multiplier for multiplier in config.pixel_channel_multipliers][::-1]
        channels = widths[0]
        self.input_projection = nn.Conv2d(config.pixel_code_dim, config.pixel_latent_dim, 1)
        layers: list[nn.Module] = [nn.Conv2d(config.pixel_latent_dim, channels, 3, padding=1)]
        layers += [ResidualConvolution(channels, channels), GridAttention(channels)]
        layers += [ResidualConvolution(channels, channels)]
        for level, width in enumerate(widths):
            for _ in range(config.pixel_decoder_num_res_blocks):
                layers += [ResidualConvolution(channels, width)] + [GridAttention(width)] * (level == 0)
                channels = width
            if level < len(widths) - 1:
                layers += [nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(channels, channels, 3, padding=1)]
        layers += [_group_norm(channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, pixel_code_dim, h, w) → (B, 3, H, W)."""
        hidden_states = self.input_projection(features)
        return self.layers(hidden_states) if torch.is_grad_enabled() else self._by_stripes(hidden_states)

    def _by_stripes(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The output of the layers, with large tensors computed in stripes."""
        layers = iter(self.layers)
        for layer in layers:
            # Upsampling and norms are computed together with the convolution that follows them.
            enlarged = 4 if isinstance(layer, nn.Upsample) else 1
            if enlarged * hidden_states.nbytes <= WHOLE_BYTES:
                hidden_states = layer(hidden_states)
            elif isinstance(layer, nn.Upsample):
                hidden_states = convolve_enlarged(hidden_states, next(layers))
            elif isinstance(layer, nn.GroupNorm):
                next(layers)
                hidden_states = convolve(hidden_states, next(layers), norm=layer)
            elif isinstance(layer, ResidualConvolution):
                hidden_states = layer.by_stripes(hidden_states)
            else:
                hidden_states = layer(hidden_states)
        return hidden_states


# `pixel_encoder_type` or `pixel_decoder_type` of [`NextFlowVQConfig`] → encoder and decoder, made of a config: pixels
# (B, 3, H, W) to latents (B, pixel_code_dim, h, w), and back.
PIXEL_BRANCHES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "convolutional": (ConvolutionalEncoder, ConvolutionalDecoder),
    "patch": (PatchEncoder, PatchDecoder),
}
