"""Padding of rows of different lengths to one tensor: tokens on the left, codes on the right with -1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence


def pad_left(rows: Sequence[list[int]], pad_token_id: int) -> dict[str, list[list[int]]]:
    """Rows of token ids as `input_ids` and `attention_mask` (rows, length), padded on the left."""
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    return {
        "input_ids": [[pad_token_id] * pad + list(row) for pad, row in zip(padding, rows)],
        "attention_mask": [[0] * pad + [1] * len(row) for pad, row in zip(padding, rows)],
    }


def padded_rows(
    rows: Sequence[list[int]], pad_token_id: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as tensors (rows, length) int64: the ids, and the mask, 1 for tokens and 0 for padding."""
    ids, mask = (torch.tensor(values, device=device) for values in pad_left(rows, pad_token_id).values())
    return ids, mask


def pad_codes(images: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Codes (n,) of each image as (num_images, N), padded with -1; `None` without images."""
    return pad_sequence(list(images), batch_first=True, padding_value=-1) if len(images) else None


def check_left_padded(mask: torch.Tensor, what: str):
    """Raises `ValueError` for a mask (B, L) with padding anywhere but on the left."""
    if not bool(mask[:, -1].all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError(f"{what} must be padded on the left: the image begins behind their last token.")
