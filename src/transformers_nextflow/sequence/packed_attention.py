"""Attention of several samples that stand in one row, none of which sees another (paper, section 3.3: packing).

`seq_idx` (B, L) says which sample of its row a position belongs to, 0, 1, 2, … from left to right. Every attention
implementation takes it as a mask; "scale_sdpa" reads sample by sample, so that a row costs what its samples cost, where
one mask over the row costs the square of its length.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from .scale_sdpa import plan_attention


def starts_of_samples(seq_idx: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: the first position of each sample."""
    return torch.diff(seq_idx, prepend=seq_idx[:, :1] - 1) != 0


def packed_causal_mask(
    config: PreTrainedConfig, inputs_embeds: torch.Tensor, seq_idx: torch.Tensor, block_ids: torch.Tensor | None
):
    """The mask of rows (B, L, D) of samples: causal within a sample, both ways within a block (B, L).

    In the form that the config's attention implementation takes.
    """
    if (plan := plan_attention(config, seq_idx, block_ids, seq_idx.shape[1])) is not None:
        return plan
    # Places that start anew are how transformers is told of samples in one row.
    place = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    place = place - torch.where(starts_of_samples(seq_idx), place, 0).cummax(-1).values
    return create_causal_mask(config, inputs_embeds, None, None, position_ids=place, block_sequence_ids=block_ids)
