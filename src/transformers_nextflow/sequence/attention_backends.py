"""The attention backends that a backbone accepts, and bidirectional attention between the slots of a scale in them."""

from __future__ import annotations

import torch
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..utils.older_transformers import CACHE_KEYWORD
from .scale_sdpa import SCALE_SDPA


class ScaleAttentionMixin:
    """Adds `bidirectional` to an attention module of transformers: its queries attend to all keys that are not masked.

    transformers' own `is_causal=False` does the same, but the backbone writes that argument into its config during the
    call. All calls on the model, also in other threads, share the config; `bidirectional` does not change it.
    """

    def forward(self, *args, bidirectional: bool = False, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        if bidirectional:
            kwargs["is_causal"] = False
        return super().forward(*args, **kwargs)


class ScaleMaskedMixin:
    """Masks and attention for the backbones of transformers. The implementation in the backbone's own config decides
    the form of a mask; the config of the model around it may name another one.
    """

    _supports_flex_attn = True
    # FlashAttention would silently drop the block mask of the scales.
    _supports_flash_attn = False

    def through_layers(
        self, hidden_states: torch.Tensor, attention_mask: dict, cache: Cache | None, **kwargs
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, D) through all layers and the norm; `attention_mask` as transformers prepares it."""
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, attention_mask=attention_mask["full_attention"], **{CACHE_KEYWORD: cache}, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_KEYWORD: cache})

    def get_correct_attn_implementation(self, requested_attention: str | None, *args, **kwargs) -> str:
        """As in transformers, but the default is "scale_sdpa" in place of "sdpa".

        Raises `ValueError` for an implementation without a mask function.
        """
        implementation = super().get_correct_attn_implementation(requested_attention, *args, **kwargs)
        if requested_attention is None and implementation == "sdpa":
            return SCALE_SDPA
        # transformers passes no mask to an implementation without a mask function. Continuous batching makes its own.
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS and not implementation.startswith("paged|"):
            raise ValueError(
                f"attn_implementation={implementation!r} has no mask function, so it would not know the scales of "
                "images; register one under its name with AttentionMaskInterface."
            )
        return implementation
