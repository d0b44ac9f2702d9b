"""The attention backends that a backbone takes, and how the slots of a scale see each other in them."""

from __future__ import annotations

import torch
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..utils.older_transformers import CACHE
from .scale_sdpa import SCALE_SDPA


class ScaleAttentionMixin:
    """Makes an attention module of transformers take `both_ways`: its queries see all keys that no mask hides.

    transformers' own `is_causal=False` does the same, but the backbone writes that argument into its config for the
    time of the call. The config belongs to every call on the model, in other threads too; `both_ways` reaches the
    attention without touching it.
    """

    def forward(self, *args, both_ways: bool = False, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        if both_ways:
            kwargs["is_causal"] = False
        return super().forward(*args, **kwargs)


class ScaleMaskedMixin:
    """For the backbones of transformers. Their own config's implementation decides the form of a mask; the config
    around it may name another.
    """

    _supports_flex_attn = True
    # It would silently drop the block mask of the scales.
    _supports_flash_attn = False

    def through_layers(
        self, hidden_states: torch.Tensor, attention_mask: dict, cache: Cache | None, **kwargs
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, D) through all layers and the norm; `attention_mask` as transformers prepares it."""
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, attention_mask=attention_mask["full_attention"], **{CACHE: cache}, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def get_correct_attn_implementation(self, requested_attention: str | None, *args, **kwargs) -> str:
        """As transformers has it, with "scale_sdpa" where it would take "sdpa" unasked.

        Raises `ValueError` for an implementation that no mask function belongs to.
        """
        implementation = super().get_correct_attn_implementation(requested_attention, *args, **kwargs)
        if requested_attention is None and implementation == "sdpa":
            return SCALE_SDPA
        # transformers gives no mask to an attention without a function for it. Continuous batching makes its own.
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS and not implementation.startswith("paged|"):
            raise ValueError(
                f"attn_implementation={implementation!r} has no mask function, so it would not know the scales of "
                "images; register one under its name with AttentionMaskInterface."
            )
        return implementation
