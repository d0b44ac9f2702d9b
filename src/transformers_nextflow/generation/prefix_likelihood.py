"""Log-probabilities of the codes of images' first scales, computed only from the prompts and those scales.

A scale does not depend on later scales, so m scales need only their own slots: 204 of 10,084 at the 1024 level for m =
8. Drawing and scoring share slots, guidance and truncation, and therefore have the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from ..scale_schedule import ScaleSchedule
from ..sequence.scale_sdpa import plan_attention
from ..utils.older_transformers import CACHE_KEYWORD
from .cached_sequences import Prompts, join_prompts
from .sampling import guide_over_contexts, truncate_logits
from .scale_loop import ImageCodes


@dataclass(frozen=True)
class PrefixColumns:
    """The codes of the first scales of images (B) side by side, scale by scale, in n columns.

    Images with smaller grids, or with fewer scales, have empty columns.

    Args:
        scales: (n,) int64, 1 … m.
        occupied: (B, n) bool.
        num_scales: m, which may be more than the scales of these images.
    """

    scales: torch.Tensor
    occupied: torch.Tensor
    num_scales: int

    @classmethod
    def of(cls, schedules: Sequence[ScaleSchedule], num_scales: int, device: torch.device | str) -> PrefixColumns:
        counts = torch.tensor(
            [[s.tokens_per_scale[k] if k < s.num_scales else 0 for k in range(num_scales)] for s in schedules],
            device=device,
        )
        widths = counts.amax(0)
        scales = torch.arange(num_scales, device=device).repeat_interleave(widths)
        cells = torch.cat([torch.arange(width, device=device) for width in widths.tolist()])
        return cls(scales + 1, cells < counts[:, scales], num_scales)

    def place(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values of the codes of each image, (N,) or at least the prefix, as (B, n), with zeros in empty columns."""
        values = torch.zeros(self.occupied.shape, dtype=rows[0].dtype, device=self.occupied.device)
        parts = [row[:count] for row, count in zip(rows, self.occupied.sum(1).tolist())]
        values[self.occupied] = torch.cat(parts).to(values.device)
        return values

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums (B, m) of values (B, n) over the codes of each scale."""
        totals = values.new_zeros(len(values), self.num_scales)
        return totals.index_add(1, self.scales - 1, values * self.occupied)

    def counts(self) -> torch.Tensor:
        """How many codes (B, m) each image has at each scale."""
        return self.sums(self.occupied.float())


@dataclass(frozen=True)
class PrefixLogProbabilities:
    """Log-probabilities (B, n) float32 of codes, zero in empty columns, and the entropies (B, n), without a gradient,
    of the distributions from which they were sampled.
    """

    values: torch.Tensor
    entropies: torch.Tensor
    columns: PrefixColumns


def prefix_log_probabilities(
    model: nn.Module,
    prompts: Prompts,
    contexts: Sequence[Prompts],
    drawing: ImageCodes,
    num_scales: int,
    truncate: bool = True,
    forward: Callable | None = None,
) -> PrefixLogProbabilities:
    """Log-probabilities of the codes of the first `num_scales` scales of drawn images.

    With the contexts and the settings with which the images were drawn it is the sampler's own distribution; without
    contexts there is no guidance.

    Args:
        model: the [`NextFlowForConditionalGeneration`] that is the policy.
        prompts: (B, L), left padded, that end with `<boi>`.
        contexts: the prompts that guidance compares with, as in [`SequenceWriter`].
        drawing: the drawn images, with at least these scales; its temperature is used, and with `truncate` its top-k
            and top-p.
        forward: a function to call in place of the model, for a wrapper around it (DDP, FSDP2, an adapter) that must
            see the pass; it is called once, and all passes run within this call.
    """
    columns = PrefixColumns.of(drawing.schedules, num_scales, model.device)

    def likelihoods(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        logits = _prefix_logits(model, prompts, contexts, drawing, min(num_scales, drawing.num_scales))
        return _of_sampled_codes(logits, columns, drawing, truncate)

    return PrefixLogProbabilities(*(forward or model)(inside=likelihoods), columns)


def _of_sampled_codes(
    logits: torch.Tensor, columns: PrefixColumns, drawing: ImageCodes, truncate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies (B, n) of the sampled codes, from logits (C, B, n', codes) before guidance."""
    codes = columns.place(list(drawing.image_tokens))
    values = torch.zeros(codes.shape, device=codes.device)
    entropies, stop = torch.zeros_like(values), 0
    for scale in range(min(columns.num_scales, drawing.num_scales)):
        start, stop = stop, stop + int((columns.scales == scale + 1).sum())
        guided = guide_over_contexts(logits[:, :, start:stop].float(), drawing.guidance[scale])
        for schedule, rows in drawing.groups.items():
            if scale < schedule.num_scales:
                own = slice(start, start + schedule.tokens_per_scale[scale])
                options = drawing.sampling.drawing_at(scale, schedule.num_scales)
                if not truncate:
                    options = {"temperature": options["temperature"]}
                values[rows, own], entropies[rows, own] = code_log_probabilities(
                    guided[rows, : own.stop - start], codes[rows, own], **options
                )
    return values, entropies


def code_log_probabilities(
    logits: torch.Tensor, codes: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (…) of codes (…) that `sample_codes` sampled from logits (…, V), and the entropies (…).

    Truncation always counts a sampled code as allowed: otherwise rounding would decide about codes at the edge, and an
    updated policy could find a code impossible that was sampled before.
    """
    # A scale with temperature 0 has no distribution of its own; the model's, at temperature 1, is used.
    logits = logits.float() / (temperature or 1.0)
    excluded = truncate_logits(logits.detach(), top_k, top_p).isinf()
    excluded = excluded.scatter(-1, codes[..., None], False)
    log_probabilities = logits.masked_fill(excluded, -torch.inf).log_softmax(-1)
    entropies = torch.special.entr(log_probabilities.detach().exp()).sum(-1)
    return log_probabilities.gather(-1, codes[..., None]).squeeze(-1), entropies


def _prefix_logits(model, prompts, contexts, drawing, num_scales) -> torch.Tensor:
    """Logits (C, B, n, codes) before guidance: one pass over the distinct prompts, which groups of images share, and
    one after them over the slots of scales 2 … `num_scales`.
    """
    num_contexts = 1 + len(contexts)
    joined, places = join_prompts((prompts, *contexts)).distinct()
    places = torch.arange(len(joined.input_ids), device=model.device) if places is None else places
    layout = model.model.layout_batch(
        joined.input_ids, joined.attention_mask, image_tokens=joined.image_tokens, image_grids=joined.image_grids
    )
    mask = torch.ones_like(joined.input_ids) if joined.attention_mask is None else joined.attention_mask
    embeds = [model.model.embed_sequence(joined.input_ids, joined.image_tokens, layout)]
    positions, logits, cache = [layout.position_ids], [], None
    layer = model.model.language_model.layers[0]
    if layer.training and layer.gradient_checkpointing:
        # Layers with gradient checkpointing drop the cache, so one pass reads all, prompts with their repetitions.
        embeds, positions = [embeds[0][places]], [layout.position_ids[:, places]]
    else:
        cache = DynamicCache(config=model.model.language_model.config)
        logits = [_read(model, embeds, positions, [layout.block_ids], [mask], 1, cache)[places]]
        cache.batch_select_indices(places)
        embeds, positions = [], []
    # Slots follow `<boi>`, whose position offsets only their scale axis.
    origin = nn.functional.pad(layout.position_ids[0, places, -1:][None], (0, 0, 0, 0, 0, 2))
    blocks, masks, first_block = [layout.block_ids[places]], [mask[places]], layout.block_ids.max() + 1
    for scale in range(1, num_scales):
        slots, coordinates, occupied = drawing.slots(scale)
        occupied = mask.new_ones(slots.shape[:2]) if occupied is None else occupied
        embeds.append(slots.repeat(num_contexts, 1, 1))
        positions.append(coordinates.repeat(1, num_contexts, 1, 1).flatten(1, 2) + origin)
        masks.append(occupied.repeat(num_contexts, 1))
        blocks.append(torch.zeros_like(masks[-1]) + first_block + scale)
    if embeds:
        count = sum(part.shape[1] for part in blocks[1:]) + (cache is None)
        logits.append(_read(model, embeds, positions, blocks, masks, count, cache))
    return torch.cat(logits, 1).unflatten(0, (num_contexts, -1))


def _read(model, embeds, positions, blocks, masks, count, cache) -> torch.Tensor:
    """Logits of the last `count` columns; `blocks` and `masks` include the cached columns."""
    embeds, mask, block_ids = (torch.cat(parts, 1) for parts in (embeds, masks, blocks))
    config = model.model.language_model.config
    attention_mask = plan_attention(config, mask - 1, block_ids, embeds.shape[1])
    if attention_mask is None:
        attention_mask = create_causal_mask(
            config=config,
            inputs_embeds=embeds,
            attention_mask=mask,
            **{CACHE_KEYWORD: cache},
            block_sequence_ids=block_ids,
        )
    return model.forward(  # not `model(…)`: this already runs within a call that wrappers see
        inputs_embeds=embeds,
        attention_mask={"full_attention": attention_mask},
        position_ids=torch.cat(positions, 2),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=count,
        codes_only=True,
    ).logits
