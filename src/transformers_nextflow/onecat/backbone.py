"""OneCAT's backbone: Qwen2 with shared attention, and three MLPs (experts) for text, input images and slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2Config
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2PreTrainedModel, Qwen2RMSNorm
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..sequence.scale_sdpa import ScaleAttentionMixin, ScaleMaskedMixin
from ..utils.older_transformers import accepts_cache_keyword
from .schedules import MAX_SCALES


# Kinds of tokens with an expert of their own; slots have the number of their scale, counted from 0.
TEXT, READ = -1, -2
# The released alpha of 128, divided by the rank of all adapters together and multiplied by their number.
ADAPTER_STRENGTH = 2.0


@dataclass(frozen=True)
class TokenKinds:
    """The kind of each token of a batch (B, L).

    Args:
        places: kind → the indices (n,) int64 of its tokens in the flattened batch; `None` for all tokens.
    """

    places: dict[int, torch.Tensor | None]

    @classmethod
    def all_of(cls, kind: int) -> TokenKinds:
        return cls({kind: None})

    @classmethod
    def of(cls, kinds: torch.Tensor) -> TokenKinds:
        """From the kind of each token (B, L) int64."""
        present = kinds.unique().tolist()
        if len(present) == 1:
            return cls.all_of(present[0])
        return cls({kind: (kinds.flatten() == kind).nonzero().squeeze(-1) for kind in present})


class ScaleAdaptedLinear(nn.Linear):
    """y = W x + 2 B_k A_k x: a linear layer with an adapter for each scale k, counted from 0."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__(in_features, out_features, bias=False)
        self.rank = rank
        self.adapter_in = nn.Parameter(torch.empty(rank * MAX_SCALES, in_features))
        self.adapter_out = nn.Parameter(torch.empty(out_features, rank * MAX_SCALES))

    def forward(self, hidden_states: torch.Tensor, scale: int) -> torch.Tensor:
        own = slice(scale * self.rank, (scale + 1) * self.rank)
        inner = F.linear(hidden_states, self.adapter_in[own])
        return super().forward(hidden_states) + ADAPTER_STRENGTH * F.linear(inner, self.adapter_out[:, own])


class DrawingMLP(nn.Module):
    """The expert of slots."""

    def __init__(self, config: Qwen2Config, rank: int):
        super().__init__()
        sizes = (config.hidden_size, config.intermediate_size)
        self.gate_proj, self.up_proj = ScaleAdaptedLinear(*sizes, rank), ScaleAdaptedLinear(*sizes, rank)
        self.down_proj = ScaleAdaptedLinear(*reversed(sizes), rank)

    def forward(self, hidden_states: torch.Tensor, scale: int) -> torch.Tensor:
        gate, up = self.gate_proj(hidden_states, scale), self.up_proj(hidden_states, scale)
        return self.down_proj(F.silu(gate) * up, scale)


class OneCatAttention(ScaleAttentionMixin, Qwen2Attention):
    """Qwen2's attention with the argument `bidirectional`."""


class OneCatDecoderLayer(GradientCheckpointingLayer):
    """Qwen2's layer with an expert for each kind of token; their names are the released ones."""

    def __init__(self, config: Qwen2Config, layer_idx: int, adapter_rank: int, drawing_only: bool):
        super().__init__()
        self.self_attn = OneCatAttention(config, layer_idx)
        self.mlp_te = Qwen2MLP(config)
        if not drawing_only:
            self.mlp_ue = Qwen2MLP(config)
        self.mlp_ge = DrawingMLP(config, adapter_rank)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, kinds: TokenKinds, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self._experts(self.post_attention_layernorm(hidden_states), kinds)

    def _experts(self, hidden_states: torch.Tensor, kinds: TokenKinds) -> torch.Tensor:
        flat = hidden_states.flatten(0, 1)
        output = torch.empty_like(flat)
        for kind, places in kinds.places.items():
            if places is None:
                return self._expert(hidden_states, kind)
            output = output.index_copy(0, places, self._expert(flat[places], kind).to(output))
        return output.view_as(hidden_states)

    def _expert(self, hidden_states: torch.Tensor, kind: int) -> torch.Tensor:
        if kind >= 0:
            return self.mlp_ge(hidden_states, kind)
        return (self.mlp_te if kind == TEXT else self.mlp_ue)(hidden_states)


def rotary_frequencies(config: Qwen2Config, device: torch.device) -> torch.Tensor:
    """(head_dim / 2,) float32: from fast to slow."""
    # Computed anew each time, since buffers would change when a model is loaded or cast.
    steps = torch.arange(0, _head_dim(config), 2, dtype=torch.int64, device=device).float()
    return 1.0 / config.rope_parameters["rope_theta"] ** (steps / _head_dim(config))


def rotary_embeddings(
    position_ids: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (B, L, head_dim) at positions.

    Positions are (B, L), or rows and columns (2, B, L): frequencies belong to rows and columns in turn, two by two.
    """
    with maybe_autocast(position_ids.device.type, enabled=False):
        angles = position_ids[..., None].float() * frequencies
        if position_ids.ndim == 3:
            of_rows = torch.arange(len(frequencies), device=angles.device) // 2 % 2 == 0
            angles = torch.where(of_rows, angles[0], angles[1])
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _head_dim(config: Qwen2Config) -> int:
    return config.hidden_size // config.num_attention_heads


class OneCatTextModel(ScaleMaskedMixin, Qwen2PreTrainedModel):
    """The backbone; takes embeddings, positions, kinds of tokens and prepared masks.

    Args:
        config: the config of the backbone.
        drawing_frequencies: the dtype to which the rotary frequencies of drawings are rounded.
    """

    _no_split_modules = ["OneCatDecoderLayer"]
    _can_record_outputs = {"hidden_states": OneCatDecoderLayer, "attentions": OneCatAttention}

    def __init__(
        self, config: Qwen2Config, adapter_rank: int, drawing_only: bool, drawing_frequencies: str = "float32"
    ):
        super().__init__(config)
        self.drawing_frequencies = getattr(torch, drawing_frequencies)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            OneCatDecoderLayer(config, index, adapter_rank, drawing_only) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()
        # Qwen2's plan with the names of the experts. The expert of slots and its adapters are not sharded.
        experts = ("mlp_te",) if drawing_only else ("mlp_te", "mlp_ue")
        self.tp_plan = {
            name.replace(".mlp.", f".{expert}."): style for expert in experts for name, style in self.tp_plan.items()
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ScaleAdaptedLinear):
            init.normal_(module.adapter_in, std=self.config.initializer_range)
            init.zeros_(module.adapter_out)

    @accepts_cache_keyword
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: dict,
        position_ids: torch.Tensor,
        kinds: TokenKinds,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            inputs_embeds: (B, L, D).
            attention_mask: `{"full_attention": mask}`, prepared by transformers.
            position_ids: (B, L) in chats; rows and columns (2, B, L) in drawings.
        """
        frequencies = rotary_frequencies(self.config, inputs_embeds.device)
        if position_ids.ndim == 3:
            frequencies = frequencies.to(self.drawing_frequencies).float()
        places = rotary_embeddings(position_ids, frequencies, inputs_embeds.dtype)
        return self.through_layers(
            inputs_embeds, attention_mask, past_key_values, kinds=kinds, position_embeddings=places, **kwargs
        )
