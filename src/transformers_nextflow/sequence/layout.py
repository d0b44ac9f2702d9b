"""The layout of images in a sequence: slots, positions, blocks of attention and weights in the loss (section 2.2).

Text at position t has the coordinates (t, t, t). An image that starts there has `<boi>` at t, the slots of grid k
(k = 2 … K) at t+k-1 on the scale axis, and `<eoi>` at t+K; text continues at t+K+1. If the last scale is read, `<eoi>`
and the text after it are one position later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..configuration_nextflow import NextFlowConfig
from ..scale_schedule import Grid, ScaleSchedule
from .packed_attention import starts_of_samples


@dataclass(frozen=True)
class SlotGrid:
    """The slots between `<boi>` and `<eoi>` of one image, (S,) each.

    `scale` is k for slots that predict grid k (K+1 for those that read the last grid and predict nothing); `row` and
    `column` are coordinates in [0, C·sqrt(aspect ratio)].
    """

    scale: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """Layout of a batch of sequences with whole images.

    Args:
        position_ids: (3, B, L) float32: scale (temporal), row, column.
        block_ids: (B, L) int64: a distinct number for each scale of each image of a row, -1 elsewhere.
        scale_ids: (B, L) int64: k at the slots that predict grid k, K+1 at those that read the last one, 0 elsewhere.
        slot_mask: (B, L) bool: slots. Row by row they are in the order of the images, their scales and their cells.
        predicting_mask: (B, L) bool: positions that predict codes: each whole image's `<boi>`, and its slots except
            those that read the last scale. Row by row they are in the order of `image_tokens`.
        predictors: (B, L) int64: the column that predicts the token at each position, see `predictors_of`.
        schedules: the schedules of all images, row by row.
        slot_places: (S,) int64: the indices of all slots in the flattened batch (B * L), row by row.
        num_scales: (S,) int64: for each slot the number of scales of its image.
    """

    position_ids: torch.Tensor
    block_ids: torch.Tensor
    scale_ids: torch.Tensor
    slot_mask: torch.Tensor
    predicting_mask: torch.Tensor
    predictors: torch.Tensor
    schedules: tuple[ScaleSchedule, ...] = ()
    slot_places: torch.Tensor | None = None
    num_scales: torch.Tensor | None = None

    def to(self, *args, **kwargs) -> SequenceLayout:
        """The layout with its tensors on another device; arguments as for a tensor."""
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **{name: tensor.to(*args, **kwargs) for name, tensor in tensors.items()})


def predictors_of(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, seq_idx: torch.Tensor | None = None
) -> torch.Tensor:
    """The column (B, L) int64 that predicts each token: the nearest one before it that is not padding.

    -1 for tokens that nothing predicts: padding, and the first token of a row, or of each of its samples if `seq_idx`
    (B, L) is given.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    valid = attention_mask.bool()
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    before = nn.functional.pad(torch.where(valid, columns, -1).cummax(-1).values[:, :-1], (1, 0), value=-1)
    if seq_idx is not None:
        valid = valid & (seq_idx.gather(1, before.clamp_min(0)) == seq_idx)
    return torch.where(valid, before, -1)


def grid_coordinates(grid: Grid, rope_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column coordinates (h*w,) of the cells of a grid: C / sqrt(h·w) · (index + 0.5)."""
    height, width = grid
    step = rope_range / (height * width) ** 0.5
    rows = (torch.arange(height, dtype=torch.float32) + 0.5) * step
    columns = (torch.arange(width, dtype=torch.float32) + 0.5) * step
    return rows.repeat_interleave(width), columns.repeat(height)


@lru_cache(maxsize=256)
def image_slots(schedule: ScaleSchedule, rope_range: float, read_last_scale: bool) -> SlotGrid:
    """The slots of one image, on the CPU."""
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
    """The slots of a batch of images, scale by scale, on the CPU, and finally the slots that read every image's last
    scale. The entry of the first scale, which has no slots, is never used.

    Each entry has the slots' coordinates (3, 1, B, n) relative to `<boi>` (scale, row, column), which are the same in
    all contexts of guidance, and (B, n) int64, 1 for slots and 0 for padding at the end of images with smaller grids or
    fewer scales; `None` without padding.
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


def schedules_of(image_grids: torch.Tensor | None, config: NextFlowConfig) -> tuple[ScaleSchedule, ...]:
    """Schedules of images with the final grids `image_grids` (num_images, 2)."""
    if image_grids is None:
        return ()
    patch_size, schedules = config.vq_config.patch_size, config.vq_config.scale_schedules
    return tuple(schedules.for_size(h * patch_size, w * patch_size) for h, w in image_grids.tolist())


def text_ids(inputs_embeds: torch.Tensor, *images: torch.Tensor | None) -> torch.Tensor:
    """Placeholder ids (B, L) for embeddings (B, L, D), which count as text.

    Raises:
        ValueError: if images were given with the embeddings.
    """
    if any(part is not None for part in images):
        raise ValueError(
            "Images come with input_ids, which say where they lie; inputs_embeds, as of learned prompts, are read as "
            "text."
        )
    return inputs_embeds.new_full(inputs_embeds.shape[:2], -1, dtype=torch.long)


def layout_batch(
    config: NextFlowConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_tokens: torch.Tensor | None = None,
    image_grids: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    start: torch.Tensor | int = 0,
) -> SequenceLayout:
    """The layout of the inputs of `forward`, with their codes checked, so that the model need not read values.

    Code that prepares batches outside of the model, such as a collator, can call this function and pass the result to
    `forward` as `layout`: such a pass compiles in one graph.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L).
        image_tokens: (num_images, N) codes, padded with -1.
        image_grids: (num_images, 2) final grids.
        seq_idx: (B, L), see `layout_sequence`.
        start: (B, 1) or a number, the first position; more than 0 if the sequences continue a cache.

    Raises:
        ValueError: if placeholders, grids and codes do not match, codes are out of range, or the sequences take more
            positions than the backbone has.
    """
    schedules = schedules_of(image_grids, config)
    layout = layout_sequence(input_ids, attention_mask, schedules, config, seq_idx, start)
    if schedules or image_tokens is not None:
        _check_codes(image_tokens, schedules, config)
    return layout


def layout_sequence(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    schedules: Sequence[ScaleSchedule],
    config: NextFlowConfig,
    seq_idx: torch.Tensor | None = None,
    start: torch.Tensor | int = 0,
) -> SequenceLayout:
    """Lay out (B, L) tokens with whole images, whose schedules are given in order of appearance, row by row.

    With `seq_idx` (B, L) a row holds several samples, and the positions of each start at 0. A `<boi>` without slots and
    `<eoi>` after it (a prompt for drawing) is text. `start` (B, 1) or a number is the first position.

    The values of tokens are read if there are images, and at the start of a sequence. They are not read when text
    continues, so no generated token waits for the device, nor for text in a graph that is being compiled.

    Raises:
        ValueError: if the placeholders do not match the images, or the sequences take more positions than the model
            has.
    """
    device, read_last = input_ids.device, config.read_last_scale
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    slot_mask = (input_ids == config.image_token_id) & valid
    end_mask = (input_ids == config.eoi_token_id) & valid
    is_begun = torch.is_tensor(start) or start > 0
    is_checked = bool(schedules) or not (is_begun or torch.compiler.is_compiling())

    advance = (valid & ~slot_mask).long()
    if is_checked:
        ends = end_mask.flatten().nonzero().squeeze(1)
        starts = _check_images(input_ids, valid, slot_mask, ends, schedules, config)
        advance.view(-1)[ends] = torch.tensor(
            [s.num_positions(read_last) - 1 for s in schedules], dtype=torch.long, device=device
        )
    position = advance.cumsum(-1)
    if seq_idx is not None:
        position = position - torch.where(starts_of_samples(seq_idx), position - advance, 0).cummax(-1).values
    position = (position - 1).clamp_min(0) + start
    if is_checked and position.numel():
        check_num_positions(int(position.max()) + 1, config)

    layout = SequenceLayout(
        position_ids=position.float().expand(3, -1, -1).clone(),
        block_ids=torch.full_like(input_ids, -1),
        scale_ids=torch.zeros_like(input_ids),
        slot_mask=slot_mask,
        predicting_mask=torch.zeros_like(slot_mask),
        predictors=predictors_of(input_ids, attention_mask, seq_idx),
    )
    return _with_images(layout, starts, schedules, config) if schedules else layout


def _with_images(
    layout: SequenceLayout, starts: torch.Tensor, schedules: Sequence[ScaleSchedule], config: NextFlowConfig
) -> SequenceLayout:
    """Fill in the slots of images whose `<boi>` tokens are at the flat indices `starts`."""
    slot_mask, device = layout.slot_mask, layout.slot_mask.device
    slots = [image_slots(schedule, config.rope_range, config.read_last_scale) for schedule in schedules]
    scale = torch.cat([slot.scale for slot in slots]).to(device)
    layout.scale_ids[slot_mask] = scale
    layout.position_ids[0][slot_mask] += scale.float() - 1
    layout.position_ids[1][slot_mask] = torch.cat([slot.row for slot in slots]).to(device)
    layout.position_ids[2][slot_mask] = torch.cat([slot.column for slot in slots]).to(device)
    # Ids are unique over the whole batch, so also within every row, however the rows are packed.
    stride = max(s.num_scales for s in schedules) + 2
    layout.block_ids[slot_mask] = torch.cat([slot.scale + stride * i for i, slot in enumerate(slots)]).to(device)
    counts = torch.cat([torch.full_like(slot.scale, s.num_scales) for slot, s in zip(slots, schedules)]).to(device)
    layout.predicting_mask[slot_mask] = scale <= counts
    layout.predicting_mask.view(-1)[starts] = True
    places = slot_mask.flatten().nonzero().squeeze(1)
    return replace(layout, schedules=tuple(schedules), slot_places=places, num_scales=counts)


def check_num_positions(count: int, config: PreTrainedConfig):
    """Raises `ValueError` for a sequence of more positions than the backbone of `config` has."""
    limit = config.text_config.max_position_embeddings
    if count > limit:
        raise ValueError(
            f"The sequence takes {count} positions, but the model has {limit} (max_position_embeddings); a token takes "
            "one, an image one for each scale. Use a shorter text, fewer images or frames, or a smaller "
            "max_new_tokens."
        )


def check_new_positions(layout: SequenceLayout, max_new_positions: torch.Tensor, config: PreTrainedConfig):
    """Raises `ValueError` if rows, and `max_new_positions` (B,) after them, take more positions than the model has."""
    check_num_positions(int((layout.position_ids[0, :, -1] + max_new_positions).max()) + 1, config)


def scale_weights(schedule: ScaleSchedule, alpha: float) -> torch.Tensor:
    """Loss weight (N,) of each code of an image: (h·w)^-alpha of its scale, scaled to a mean of one (section 3.1)."""
    counts = torch.tensor(schedule.tokens_per_scale, dtype=torch.float32)
    weights = counts**-alpha
    weights = weights * schedule.num_tokens / (weights * counts).sum()
    return weights.repeat_interleave(counts.long())


def _check_images(input_ids, valid, slot_mask, ends, schedules, config) -> torch.Tensor:
    """Flat indices of the `<boi>` of whole images. Raises `ValueError` if slots and images do not match."""
    if len(ends) != len(schedules):
        raise ValueError(
            f"The sequences hold {len(ends)} whole images (<eoi> tokens), but {len(schedules)} images were given; "
            "each image needs one placeholder in the text."
        )
    if not schedules and not bool(slot_mask.any()):
        return ends
    slots_before = slot_mask.flatten().long().cumsum(0)
    counts = torch.diff(slots_before[ends], prepend=slots_before.new_zeros(1))
    expected = [schedule.num_slots(config.read_last_scale) for schedule in schedules]
    starts = ends - counts - 1
    is_start = ((input_ids == config.boi_token_id) & valid).flatten()
    whole = is_start[starts] & (slots_before[ends] - slots_before[starts] == counts)
    if counts.tolist() != expected or not bool(whole.all()):
        raise ValueError(
            f"The images take {counts.tolist()} slots behind their <boi> in the sequences, but their schedules have "
            f"{expected}; was the text prepared with another size or read_last_scale setting?"
        )
    if int(slot_mask.sum()) != sum(expected):
        raise ValueError("There are image slots outside of <boi> … <eoi>; an image must be closed by <eoi>.")
    return starts


def _check_codes(image_tokens: torch.Tensor | None, schedules: Sequence[ScaleSchedule], config: NextFlowConfig):
    """Raises `ValueError` for codes that the slots of images cannot read."""
    if image_tokens is None:
        raise ValueError(f"{len(schedules)} image_grids came without image_tokens or pixel_values; give one.")
    if len(image_tokens) != len(schedules):
        raise ValueError(f"{len(image_tokens)} rows of image_tokens came with {len(schedules)} image_grids.")
    counts = [num_codes_read(schedule, config) for schedule in schedules]
    for schedule, count in zip(schedules, counts):
        if image_tokens.shape[1] < count:
            raise ValueError(
                f"image_tokens hold {image_tokens.shape[1]} codes an image, but the slots of a final grid "
                f"{schedule.final_grid} read {count}; are they a preview, or from another size?"
            )
    columns = torch.arange(image_tokens.shape[1], device=image_tokens.device)
    codes = image_tokens[columns < torch.tensor(counts, device=image_tokens.device)[:, None]]
    size = config.vq_config.codebook_size
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(
            f"image_tokens run from 0 to {size - 1}, got {int(codes.min())} to {int(codes.max())}; do they come from "
            "another tokenizer, or from images of another size?"
        )


def num_codes_read(schedule: ScaleSchedule, config: NextFlowConfig) -> int:
    """How many of the codes of an image its slots read: all, or those before the last grid."""
    return schedule.num_tokens if config.read_last_scale else schedule.offsets[-2]
