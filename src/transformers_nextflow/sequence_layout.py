"""Where a picture lies in a sequence: slots, positions, blocks and weights, each in one place (paper, section 2.2).

Text at position t has the coordinates (t, t, t). A picture that starts there has `<boi>` at t, the slots of grid k
(k = 2 … K) at t+k-1 on the scale axis, `<eoi>` at t+K; text goes on at t+K+1. Reading the last scale takes one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .configuration_nextflow import NextFlowConfig
from .packed_attention import starts_of_samples
from .scale_schedule import Grid, ScaleSchedule


@dataclass(frozen=True)
class SlotGrid:
    """The slots between `<boi>` and `<eoi>` of one picture, (S,) each.

    `scale` is k for slots that predict grid k (K+1 for those that read the last grid and predict nothing); `row` and
    `column` are coordinates in [0, C·sqrt(aspect ratio)].
    """

    scale: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """Layout of a batch of sequences with whole pictures.

    Args:
        position_ids: (3, B, L) float32: scale (temporal), row, column.
        block_ids: (B, L) int64: a number of its own for each scale of each picture of a row, -1 elsewhere.
        scale_ids: (B, L) int64: k at the slots that predict grid k, K+1 at those that read the last one, 0 elsewhere.
        slot_mask: (B, L) bool: slots. Read row by row they follow the pictures, their scales, their cells.
        predicting_mask: (B, L) bool: positions that predict codes: each whole picture's `<boi>` and its slots but those
            that read the last scale. Read row by row they follow `image_tokens`.
    """

    position_ids: torch.Tensor
    block_ids: torch.Tensor
    scale_ids: torch.Tensor
    slot_mask: torch.Tensor
    predicting_mask: torch.Tensor


def grid_coordinates(grid: Grid, rope_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column coordinates (h*w,) of the cells of a grid: C / sqrt(h·w) · (index + 0.5)."""
    height, width = grid
    step = rope_range / (height * width) ** 0.5
    rows = (torch.arange(height, dtype=torch.float32) + 0.5) * step
    columns = (torch.arange(width, dtype=torch.float32) + 0.5) * step
    return rows.repeat_interleave(width), columns.repeat(height)


@lru_cache(maxsize=256)
def picture_slots(schedule: ScaleSchedule, rope_range: float, read_last_scale: bool) -> SlotGrid:
    """The slots of one picture, on the CPU."""
    grids = schedule.slot_grids(read_last_scale)
    coordinates = [grid_coordinates(grid, rope_range) for grid in grids]
    empty = torch.zeros(0)
    return SlotGrid(
        scale=torch.tensor([scale for scale, (h, w) in enumerate(grids, start=2) for _ in range(h * w)]).long(),
        row=torch.cat([empty] + [rows for rows, _ in coordinates]),
        column=torch.cat([empty] + [columns for _, columns in coordinates]),
    )


@lru_cache(maxsize=256)
def batch_slots(
    schedules: tuple[ScaleSchedule, ...], rope_range: float
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The slots of a batch of pictures scale by scale, on the CPU, and at last those that read every picture's last
    scale; those of the first scale are never read.

    Each entry has their coordinates (3, 1, B, n) behind `<boi>`: scale, row, column, the same in all contexts of
    guidance; and which slots are a picture's own (B, n) int64: pictures with smaller grids, or with fewer scales, have
    empty ones at the end; `None` where none is.
    """
    longest = max(schedule.num_scales for schedule in schedules)
    scales = [[min(scale, s.num_scales) for s in schedules] for scale in range(longest)]
    grids = [[s.grids[k] if k < s.num_scales else (0, 0) for k, s in zip(row, schedules)] for row in scales]
    scales.append([s.num_scales for s in schedules])
    grids.append([s.final_grid for s in schedules])
    return [_slots_side_by_side(*entry, rope_range) for entry in zip(scales, grids)]


def _slots_side_by_side(
    scales: Sequence[int], grids: Sequence[Grid], rope_range: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    count = max(height * width for height, width in grids)
    coordinates, occupied = torch.zeros(3, len(grids), count), torch.zeros(len(grids), count, dtype=torch.long)
    for row, (scale, (height, width)) in enumerate(zip(scales, grids)):
        if own := height * width:
            coordinates[0, row] = scale
            coordinates[1:, row, :own] = torch.stack(grid_coordinates((height, width), rope_range))
            occupied[row, :own] = 1
    return coordinates[:, None], None if bool(occupied.all()) else occupied


def layout_sequence(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    schedules: Sequence[ScaleSchedule],
    config: NextFlowConfig,
    seq_idx: torch.Tensor | None = None,
) -> SequenceLayout:
    """Lay out (B, L) tokens with whole pictures, whose schedules come in order of appearance, row by row.

    With `seq_idx` (B, L) a row holds several samples, and each one's positions start at 0. A `<boi>` without slots and
    `<eoi>` behind it (a prompt for drawing) is text.

    Raises:
        ValueError: if the placeholders do not match the pictures.
    """
    device, read_last = input_ids.device, config.read_last_scale
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    slot_mask = (input_ids == config.image_token_id) & valid
    ends = ((input_ids == config.eoi_token_id) & valid).flatten().nonzero().squeeze(1)
    starts = _check_pictures(input_ids, valid, slot_mask, ends, schedules, config)

    advance = (valid & ~slot_mask).long()
    if schedules:
        steps = torch.tensor([s.num_scales + read_last for s in schedules], dtype=torch.long, device=device)
        advance.view(-1)[ends] = steps
    position = advance.cumsum(-1)
    if seq_idx is not None:
        position = position - torch.where(starts_of_samples(seq_idx), position - advance, 0).cummax(-1).values
    position = (position - 1).clamp_min(0)

    position_ids = position.float().expand(3, -1, -1).clone()
    scale_ids = torch.zeros_like(input_ids)
    block_ids = torch.full_like(input_ids, -1)
    predicting = torch.zeros_like(slot_mask)
    if schedules:
        slots = [picture_slots(schedule, config.rope_range, read_last) for schedule in schedules]
        scale = torch.cat([slot.scale for slot in slots]).to(device)
        scale_ids[slot_mask] = scale
        position_ids[0][slot_mask] += scale.float() - 1
        position_ids[1][slot_mask] = torch.cat([slot.row for slot in slots]).to(device)
        position_ids[2][slot_mask] = torch.cat([slot.column for slot in slots]).to(device)
        # Ids are unique over the whole batch, hence within every row, however the rows are packed.
        stride = max(s.num_scales for s in schedules) + 2
        block_ids[slot_mask] = torch.cat([slot.scale + stride * i for i, slot in enumerate(slots)]).to(device)
        last = torch.cat([slot.scale == s.num_scales + 1 for slot, s in zip(slots, schedules)]).to(device)
        predicting[slot_mask] = ~last
        predicting.view(-1)[starts] = True
    return SequenceLayout(position_ids, block_ids, scale_ids, slot_mask, predicting)


def scale_weights(schedule: ScaleSchedule, alpha: float) -> torch.Tensor:
    """Loss weight (N,) of each code of a picture: (h·w)^-alpha of its scale, brought to a mean of one (section 3.1)."""
    counts = torch.tensor(schedule.tokens_per_scale, dtype=torch.float32)
    weights = counts**-alpha
    weights = weights * schedule.num_tokens / (weights * counts).sum()
    return weights.repeat_interleave(counts.long())


def _check_pictures(input_ids, valid, slot_mask, ends, schedules, config) -> torch.Tensor:
    """Flat positions of the whole pictures' `<boi>`; a `ValueError` if slots and pictures do not match."""
    if len(ends) != len(schedules):
        raise ValueError(
            f"The sequences hold {len(ends)} whole pictures (<eoi> tokens), but {len(schedules)} pictures were given; "
            "each picture needs one placeholder in the text."
        )
    if not schedules and not bool(slot_mask.any()):
        return ends
    slots_before = slot_mask.flatten().long().cumsum(0)
    counts = torch.diff(slots_before[ends], prepend=slots_before.new_zeros(1))
    expected = [schedule.num_slots(config.read_last_scale) for schedule in schedules]
    starts = ends - counts - 1
    is_start = ((input_ids == config.boi_token_id) & valid).flatten()
    if counts.tolist() != expected or (len(ends) and not bool(is_start[starts].all())):
        raise ValueError(
            f"The pictures take {counts.tolist()} slots behind their <boi> in the sequences, but their schedules have "
            f"{expected}; was the text prepared with another size or read_last_scale setting?"
        )
    if int(slot_mask.sum()) != sum(expected):
        raise ValueError("There are picture slots outside of <boi> … <eoi>; a picture must be closed by <eoi>.")
    return starts
