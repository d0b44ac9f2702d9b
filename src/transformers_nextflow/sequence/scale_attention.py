"""Attention modules that take `both_ways`, for slots that see each other, without changing the shared config."""

from __future__ import annotations

import torch


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
