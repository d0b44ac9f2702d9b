"""The loss: cross-entropy of text and codes under one soft-max, codes weighted by scale (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .configuration_nextflow import NextFlowConfig
from .scale_schedule import ScaleSchedule
from .sequence_layout import SequenceLayout, scale_weights


IGNORE_INDEX = -100


@dataclass(frozen=True)
class LossTargets:
    """Which positions (B, L) are trained on, and in the order in which the mask selects them, (n,) each:
    the class (text first, then codes), its weight, and its scale (1 … K; 0 for text)."""

    mask: torch.Tensor
    classes: torch.Tensor
    weights: torch.Tensor
    scales: torch.Tensor


def loss_targets(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    image_labels: torch.Tensor | None,
    layout: SequenceLayout,
    schedules: Sequence[ScaleSchedule],
    config: NextFlowConfig,
) -> LossTargets:
    """Targets of a batch.

    A text position predicts the next label. `<boi>` and slots predict their own scale's codes, unshifted, and count if
    the label at the picture's `<eoi>` is not -100. Nothing predicts a slot or `<eoi>`: they follow from the schedule.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    next_ids = F.pad(input_ids[:, 1:], (0, 1), value=config.eoi_token_id)
    is_text = (following != IGNORE_INDEX) & (next_ids != config.image_token_id) & (next_ids != config.eoi_token_id)
    is_text &= ~layout.slot_mask & ~layout.predicting_mask
    classes = torch.where(is_text, following, 0)
    weights = is_text.float()
    scales = torch.zeros_like(input_ids)
    mask = is_text
    if schedules:
        codes = torch.cat([row[: s.num_tokens] for row, s in zip(image_labels, schedules)])
        alpha = config.scale_loss_alpha
        ends = input_ids == config.eoi_token_id
        trained = (labels[ends] != IGNORE_INDEX).tolist()
        weight = torch.cat([scale_weights(s, alpha) * on for s, on in zip(schedules, trained)]).to(labels.device)
        scale = [k for s in schedules for k, count in enumerate(s.tokens_per_scale, 1) for _ in range(count)]
        classes[layout.predicting_mask] = codes.to(labels.device) + config.text_config.vocab_size
        weights[layout.predicting_mask] = weight
        scales[layout.predicting_mask] = torch.tensor(scale, device=labels.device)
        mask = weights > 0
    return LossTargets(mask, classes[mask], weights[mask], scales[mask])


def nextflow_loss(
    total: torch.Tensor,
    losses: torch.Tensor,
    correct: torch.Tensor,
    targets: LossTargets,
    num_scales: int,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> dict[str, torch.Tensor]:
    """Losses from the weighted sum () of the cross-entropies and from each one (n,), at the trained positions.

    `correct` (n,) tells which positions give their class the highest probability of all.

    Returns `loss` (the sum over the number of trained positions, or over `num_items_in_batch`), `text_loss` and
    `image_loss` (means over text tokens, weighted over codes), `scale_losses` (num_scales,) unweighted means, and
    `text_accuracy` and `scale_accuracies` (num_scales,), shares of correct ones; NaN where a batch has nothing of the
    kind. Only `loss` has a gradient.
    """
    losses = losses.detach()
    weighted = losses * targets.weights
    is_code = targets.scales > 0
    count = len(losses) if num_items_in_batch is None else num_items_in_batch
    per_scale = torch.zeros(num_scales + 1, device=losses.device)
    sums = per_scale.index_add(0, targets.scales, losses)
    counts = per_scale.index_add(0, targets.scales, torch.ones_like(losses))
    accuracies = per_scale.index_add(0, targets.scales, correct.to(losses.dtype)) / counts
    return {
        "loss": total / max(count, 1) if isinstance(count, int) else total / count,
        "text_loss": weighted[~is_code].mean(),
        "image_loss": weighted[is_code].mean(),
        "scale_losses": (sums / counts)[1:],
        "text_accuracy": accuracies[0],
        "scale_accuracies": accuracies[1:],
    }
