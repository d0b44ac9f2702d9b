"""Attention of several samples that stand in one row, none of which sees another (paper, section 3.3: packing).

`seq_idx` (B, L) says which sample of its row a position belongs to, 0, 1, 2, … from left to right. Every attention
implementation takes it as a mask. "packed_sdpa" computes scaled dot product attention sample by sample, so that a row
costs what its samples cost, where one mask over the row costs the square of its length.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask


PACKED_SDPA = "packed_sdpa"
# A mask, or `None` for causal attention, and the number of positions of each sample of the one row.
SampleMasks = list[tuple[int, torch.Tensor | None]]


def starts_of_samples(seq_idx: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: the first position of each sample."""
    return torch.diff(seq_idx, prepend=seq_idx[:, :1] - 1) != 0


def packed_causal_mask(
    config: PreTrainedConfig, inputs_embeds: torch.Tensor, seq_idx: torch.Tensor, block_ids: torch.Tensor | None
):
    """The mask of rows (B, L, D) of samples: causal within a sample, both ways within a block (B, L).

    In the form that the config's attention implementation takes; [`SampleMasks`] for "packed_sdpa" and one row.
    """
    if config._attn_implementation == PACKED_SDPA and len(seq_idx) == 1:
        masks, start = [], 0
        for length in torch.unique_consecutive(seq_idx, return_counts=True)[1].tolist():
            span = slice(start, start + length)
            blocks = None if block_ids is None else block_ids[:, span]
            if blocks is not None and not bool((blocks >= 0).any()):
                blocks = None  # text: causal attention needs no mask, and is faster without
            mask = create_causal_mask(config, inputs_embeds[:, span], None, None, block_sequence_ids=blocks)
            masks.append((length, mask))
            start += length
        return masks
    # Places that start anew are how transformers is told of samples in one row.
    place = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    place = place - torch.where(starts_of_samples(seq_idx), place, 0).cummax(-1).values
    return create_causal_mask(config, inputs_embeds, None, None, position_ids=place, block_sequence_ids=block_ids)


def packed_sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: SampleMasks | torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention (B, L, H, D) of queries, keys and values (B, H, L, D), sample by sample where masks come so."""
    if not isinstance(attention_mask, list):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = [length for length, _ in attention_mask]
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), attention_mask)
    outputs = [sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0] for q, k, v, (_, mask) in parts]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa_attention_forward)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
