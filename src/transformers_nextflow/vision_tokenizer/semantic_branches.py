"""The semantic encoder (any vision model of transformers with patches) and the decoder to the teacher's features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from ..configuration_nextflow import NextFlowVQConfig
from ..scale_schedule import Grid
from ..utils.offloading import onload_weights
from .resampling import resample


def read_semantics(
    encoder: nn.Module, config: NextFlowVQConfig, pixel_values: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Features (B, h, w, D) of images (B, 3, H, W) in [-1, 1] on the grid, of the layer `config.semantic_layer`."""
    tower, layer = config.semantic_config, config.semantic_layer
    if config.image_size is None:
        pixel_values = resample(pixel_values, (grid[0] * tower.patch_size, grid[1] * tower.patch_size), "bicubic")
    # transformers' vision models read some weights, such as position embeddings, without calling their module.
    with onload_weights(encoder.modules()):
        outputs = encoder(**_inputs_of(tower, pixel_values, grid), output_hidden_states=layer != -1)
    features = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    if layer == -1 and tower.model_type == "clip_vision_model":
        # transformers applies CLIP's closing norm only to the class token.
        features = encoder.post_layernorm(features)
    # Encoders with a class token put it first.
    return features[:, -grid[0] * grid[1] :].unflatten(1, grid)


def _inputs_of(tower: PreTrainedConfig, pixel_values: torch.Tensor, grid: Grid) -> dict:
    """The arguments with which a vision model of transformers reads images of any size."""
    if not tower.model_type.startswith("siglip2"):
        return {"pixel_values": pixel_values, "interpolate_pos_encoding": True}
    # NaFlex reads a list of patches, each with its channels last, and the shape of the grid beside it.
    patches = pixel_values.unfold(2, tower.patch_size, tower.patch_size).unfold(3, tower.patch_size, tower.patch_size)
    patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor([grid] * len(patches), device=patches.device)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


class SemanticDecoder(nn.Module):
    """A ViT that predicts the teacher's features."""

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        hidden = config.semantic_decoder_hidden_size
        encoder_config = SiglipVisionConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=config.semantic_decoder_depth,
            num_attention_heads=config.semantic_decoder_heads,
            hidden_act=config.semantic_decoder_hidden_act,
            attn_implementation="sdpa",  # pyrefly: ignore[unexpected-keyword]
        )
        self.input_projection = nn.Linear(config.semantic_code_dim, hidden)
        learned = config.semantic_decoder_positions == "learned"
        self.positions = LearnedPositions(config) if learned else SinusoidalPositions()
        self.encoder = SiglipEncoder(encoder_config)
        self.norm = nn.LayerNorm(hidden)
        self.output_projection = nn.Sequential(
            nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, config.semantic_target_dim)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, semantic_code_dim, h, w) → (B, h, w, semantic_target_dim)."""
        grid = features.shape[-2:]
        hidden_states = self.input_projection(features.flatten(2).transpose(1, 2))
        hidden_states = self.encoder(self.positions(hidden_states, grid)).last_hidden_state
        hidden_states = hidden_states[:, -grid[0] * grid[1] :]
        return self.output_projection(self.norm(hidden_states)).unflatten(1, grid)


class SinusoidalPositions(nn.Module):
    """Sinusoidal positions for any grid."""

    def forward(self, hidden_states: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Adds positions to (B, h*w, D)."""
        return hidden_states + _grid_sinusoids(grid, hidden_states)


class LearnedPositions(nn.Module):
    """A class token and learned positions of the square finest grid: TokenFlow's semantic decoder."""

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        self.grid = config.scale_schedules.build().final_grid
        hidden = config.semantic_decoder_hidden_size
        self.class_token = nn.Parameter(torch.empty(1, 1, hidden))
        self.positions = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], hidden))

    def forward(self, hidden_states: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, h*w, D) → (B, 1 + h*w, D), the class token first. Raises `ValueError` for another grid."""
        if tuple(grid) != self.grid:
            raise ValueError(
                f"The semantic decoder learned positions only for the grid {self.grid}, got {tuple(grid)}."
            )
        class_token = self.class_token.expand(len(hidden_states), -1, -1)
        return torch.cat([class_token, hidden_states], dim=1) + self.positions


def _grid_sinusoids(grid: Grid, like: torch.Tensor) -> torch.Tensor:
    """(1, h*w, D): half the channels encode the row, half the column, both relative to the grid's geometric mean."""
    height, width = grid
    quarter = like.shape[-1] // 4
    frequencies = torch.pi * 2.0 ** torch.linspace(0, 6, quarter, device=like.device)
    side = (height * width) ** 0.5
    rows = ((torch.arange(height, device=like.device) + 0.5) / side)[:, None] * frequencies
    columns = ((torch.arange(width, device=like.device) + 0.5) / side)[:, None] * frequencies
    rows = torch.cat([rows.sin(), rows.cos()], -1)[:, None].expand(-1, width, -1)
    columns = torch.cat([columns.sin(), columns.cos()], -1)[None].expand(height, -1, -1)
    table = torch.cat([rows, columns], -1).flatten(0, 1)
    return F.pad(table, (0, like.shape[-1] - table.shape[-1]))[None].to(like.dtype)
