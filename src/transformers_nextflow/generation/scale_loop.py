"""The scale loop: images are drawn side by side, a grid of codes in each pass (paper, section 2.3)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from ..utils.known_names import check_function
from ..utils.typed_values import check_types
from .cached_sequences import CachedSequences
from .guidance import guide_over_contexts
from .image_codes import ImageCodes, ScaleState
from .sampling import ImageSampling


ScaleCallback = Callable[[nn.Module, int, ScaleState], bool | None]


def check_drawing(sampling: ImageSampling | None, callback: ScaleCallback | None):
    """Raises `ValueError` for what are no settings, and for what cannot be called after each scale."""
    check_types({"sampling": sampling}, {"sampling": ImageSampling | None}, "generate_images")
    if callback is not None:
        check_function(callback, 3, "callback")


class EagerScales:
    """The scales of images (B), read uncompiled by the rows `rows` (C, B) of `sequences`."""

    def __init__(self, drawing: ImageCodes, sequences: CachedSequences, rows: torch.Tensor):
        self.drawing, self.sequences, self.rows = drawing, sequences, rows
        self.origins = sequences.slot_origins(rows)

    def read(self, scale: int, round_: int = 0) -> torch.Tensor:
        """Hidden states (C, B, n, D) of the slots of a scale, counted from 0."""
        embeds, coordinates, occupied = self.drawing.slots(scale, round_)
        read = self.sequences.read_slots if round_ == 0 else self.sequences.read_slots_again
        return read(embeds, self.origins + coordinates, occupied, self.rows)

    def drop_contexts(self):
        """Continue without the rows that only guidance needs."""
        self.sequences.keep(self.rows[0])
        self.rows = torch.arange(self.rows.shape[1], device=self.rows.device)[None]
        self.origins = self.origins[:, :1]


def draw_scales(
    model: nn.Module,
    drawing: ImageCodes,
    sequences: CachedSequences,
    hidden_states: torch.Tensor,
    rows: torch.Tensor,
    callback: ScaleCallback | None = None,
    continues: bool = True,
) -> int:
    """Draw images (B) after the tokens that `sequences` have read.

    Args:
        hidden_states: (C, B, 1, D) of the tokens that open the images, under each context that guidance compares.
        rows: (C, B) int64, the rows of `sequences` to which they belong.
        callback: `callback(model, scale, state)` after each scale, counted from 0; `False` stops the drawing.
        continues: whether anything is read afterwards. If not, rows that only guidance needs leave the cache after the
            last guided scale, and the scales may be compiled ones.

    Returns:
        The number of scales drawn; fewer than all if the callback stopped the drawing.
    """
    compiled = None if continues else getattr(model, "compiled_drawing", None)
    with nullcontext() if compiled is None else compiled.scales(drawing, sequences, rows) as recorded:
        scales = recorded or EagerScales(drawing, sequences, rows)
        for scale in range(drawing.num_scales):
            for round_ in range(drawing.num_rounds(scale)):
                if scale > 0:
                    hidden_states = scales.read(scale, round_)
                logits = guide_over_contexts(model.visual_head(hidden_states).float(), drawing.guidance[scale])
                drawing.sample(scale, logits, round_)
            if callback is not None and callback(model, scale, drawing.state(scale, logits)) is False:
                return scale + 1
            if not continues and scale == drawing.last_guided_scale < drawing.num_scales - 1:
                scales.drop_contexts()
    return drawing.num_scales
