"""Batches of prompts, with the images in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..sequence.padding import pad_codes


@dataclass(frozen=True)
class Prompts:
    """Rows (B, L) of tokens, padded on the left, with the images in them, row by row.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L); `None` for no padding.
        image_tokens: (num_images, N) codes.
        image_grids: (num_images, 2) final grids.
        max_new_positions: (B,) int64, the largest number of positions after each row; `None` for none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    image_grids: torch.Tensor | None = None
    max_new_positions: torch.Tensor | None = None

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, torch.Tensor], prefix: str = "") -> Prompts:
        """The prompts among the arguments of `generate_images`, whose names begin with `prefix`."""
        names = ("input_ids", "attention_mask", "image_tokens", "image_grids")
        return cls(*(inputs.get(prefix + name) for name in names))

    @property
    def mask(self) -> torch.Tensor:
        """(B, L) int64, 1 for tokens, 0 for padding."""
        return torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask

    def rows(self) -> list[list[int]]:
        """The tokens of each row, without padding."""
        if self.attention_mask is None:
            return self.input_ids.tolist()
        return [ids[keep].tolist() for ids, keep in zip(self.input_ids, self.attention_mask.bool())]

    def distinct(self) -> tuple[Prompts, torch.Tensor | None]:
        """The prompts without repetitions, and the index (B,) of each row among them; `None` if no row is removed.

        Images drawn from one prompt share it, and the negative prompt is mostly the same for all. Rows with images are
        not compared.
        """
        if self.image_grids is not None:
            return self, None
        rows, places = torch.cat([self.input_ids, self.mask], dim=1).unique(dim=0, return_inverse=True)
        if len(rows) == len(places):
            return self, None
        most = self.max_new_positions
        if most is not None:
            most = most.new_zeros(len(rows)).scatter_reduce(0, places, most, "amax")
        return Prompts(*rows.chunk(2, dim=1), max_new_positions=most), places


def join_prompts(parts: Sequence[Prompts]) -> Prompts:
    """Several batches of prompts, also of different lengths, as one."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.input_ids.shape[1] for part in parts)

    def joined(name: str) -> torch.Tensor:
        values = [getattr(part, name) for part in parts]
        return torch.cat([nn.functional.pad(value, (length - value.shape[1], 0), value=0) for value in values])

    images = [part for part in parts if part.image_grids is not None]
    most = [part.max_new_positions for part in parts]
    most = [torch.zeros_like(part.input_ids[:, 0]) if own is None else own for part, own in zip(parts, most)]
    return Prompts(
        joined("input_ids"),
        joined("mask"),
        pad_codes([row for part in images for row in part.image_tokens]),
        torch.cat([part.image_grids for part in images]) if images else None,
        torch.cat(most),
    )
