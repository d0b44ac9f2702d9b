"""The scale loop: images are drawn side by side, a grid of codes in each pass (paper, section 2.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .cached_sequences import CachedSequences
from .image_codes import ImageCodes, ScaleState
from .sampling import guide_over_contexts


ScaleCallback = Callable[[nn.Module, int, ScaleState], bool | None]


def draw_scales(
    model: nn.Module,
    drawing: ImageCodes,
    sequences: CachedSequences,
    hidden_states: torch.Tensor,
    rows: torch.Tensor,
    callback: ScaleCallback | None = None,
    go_on: bool = True,
) -> int:
    """Draw images (B) behind what `sequences` have read.

    Args:
        hidden_states: (C, B, 1, D) of the tokens that open the images, under each context that guidance compares.
        rows: (C, B) int64, the rows of `sequences` that they are of.
        callback: `callback(model, scale, state)` after each scale, counted from 0; `False` stops the drawing.
        go_on: whether anything is read afterwards. If not, rows that only guidance needs leave the cache after its
            last scale.

    Returns:
        The number of scales drawn; fewer than all where the callback stopped.
    """
    origins = sequences.slot_origins(rows)
    for scale in range(drawing.num_scales):
        for round_ in range(drawing.num_rounds(scale)):
            if scale > 0:
                embeds, coordinates, occupied = drawing.slots(scale, round_)
                read = sequences.read_slots if round_ == 0 else sequences.read_slots_again
                hidden_states = read(embeds, origins + coordinates, occupied, rows)
            logits = guide_over_contexts(model.visual_head(hidden_states).float(), drawing.guidance[scale])
            drawing.draw(scale, logits, round_)
        if callback is not None and callback(model, scale, drawing.state(scale, logits)) is False:
            return scale + 1
        if not go_on and scale == drawing.last_guided_scale < drawing.num_scales - 1:
            sequences.keep(rows[0])
            rows, origins = torch.arange(rows.shape[1], device=rows.device)[None], origins[:, :1]
    return drawing.num_scales
