"""Attention of several samples in one row, none of which attends to another (paper, section 3.3: packing).

`seq_idx` (B, L) says which sample of its row a position belongs to, 0, 1, 2, … from left to right. Most attention
implementations use it as a mask, which costs the square of the row's length; "scale_sdpa" reads sample by sample, so a
row costs as much as its samples.
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
    """The mask of rows (B, L, D) of samples: causal within a sample, bidirectional within a block (B, L).

    It has the form that the config's attention implementation takes.
    """
    if (plan := plan_attention(config, seq_idx, block_ids, seq_idx.shape[1])) is not None:
        return plan
    # transformers finds the samples of a row by positions that start anew.
    place = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    place = place - torch.where(starts_of_samples(seq_idx), place, 0).cummax(-1).values
    return create_causal_mask(config, inputs_embeds, None, None, position_ids=place, block_sequence_ids=block_ids)
