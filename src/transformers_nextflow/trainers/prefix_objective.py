"""The objective of RL on the first scales of pictures: clipped ratios and a penalty on drift, weighted by scale
(paper, section 3.2.5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..prefix_likelihood import PrefixColumns
from ..scale_schedule import ScaleSchedule
from ..sequence_layout import scale_weights


RATIO_LEVELS = ("token", "scale_mean", "scale_product")


def prefix_weights(schedules: Sequence[ScaleSchedule], columns: PrefixColumns, alpha: float) -> torch.Tensor:
    """Weight (B, n) of each code: (h·w)^-alpha of its scale, brought to a sum of one for each picture."""
    weights = columns.place([scale_weights(schedule, alpha) for schedule in schedules])
    return weights / weights.sum(1, keepdim=True)


def policy_terms(
    log_ratios: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    columns: PrefixColumns,
    level: str = "token",
    epsilon: tuple[float, float] = (0.2, 0.2),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the objective gains from each code.

    Args:
        log_ratios: (B, n) of each code, new over old policy.
        advantages: (B,).
        weights: (B, n) of `prefix_weights`.
        level: what is clipped: the ratio of each code, the mean (geometric) over a scale's codes, or the product over
            them, which is the ratio of the scale's whole grid (paper, equation 5). At ratio one all three have the same
            gradient.
        epsilon: how far below and above one a ratio may go.

    Returns:
        The terms (B, n), to be summed; the ratios (B, n), and which are clipped (B, n) bool.
    """
    if level != "token":
        pooled = columns.sums(log_ratios)
        if level == "scale_mean":
            pooled = pooled / columns.counts().clamp_min(1)
        else:
            # The product's gradient is already a sum over codes: its weight is divided among them.
            weights = weights / columns.counts().clamp_min(1)[:, columns.scales - 1]
        log_ratios = pooled[:, columns.scales - 1]
    ratios, advantages = log_ratios.exp(), advantages[:, None]
    low, high = epsilon
    terms = torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    is_clipped = ((ratios < 1 - low) & (advantages < 0)) | ((ratios > 1 + high) & (advantages > 0))
    return terms * weights, ratios, is_clipped & columns.occupied


def drift(log_probabilities: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL divergence of the policy from the reference, estimated at each drawn code: unbiased, never negative (k3)."""
    difference = reference - log_probabilities
    return difference.exp() - difference - 1
