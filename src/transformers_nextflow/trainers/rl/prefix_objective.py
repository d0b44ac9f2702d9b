"""The objective of RL on the first scales of images: clipped ratios and a penalty on KL, weighted by scale
(paper, section 3.2.5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...generation.prefix_likelihood import PrefixColumns
from ...scale_schedule import ScaleSchedule
from ...sequence.layout import scale_weights


Box = tuple[float, float, float, float]

RATIO_LEVELS = ("token", "scale_mean", "scale_product")


def scale_shares(
    schedules: Sequence[ScaleSchedule], columns: PrefixColumns, alpha: float, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight (B, n) of each code: (h·w)^-alpha of its scale, scaled to a sum of one for each image.

    `counted` (n,) or (B, n) bool says which codes count, default all; an image without such codes has the weight zero.
    """
    weights = columns.place([scale_weights(schedule, alpha) for schedule in schedules])
    if counted is not None:
        weights = weights * counted
    return weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def box_mask(boxes: Sequence[Box], schedule: ScaleSchedule) -> torch.Tensor:
    """A mask (N,) bool of the codes of an image in one of the boxes, at every scale. A cell counts if a box touches it,
    so a place that is marked at a fine scale is marked at all coarser ones (VAR RL Done Right, arXiv 2601.02256).

    `boxes` are (left, top, right, bottom) in shares of the image's sides.

    Raises:
        ValueError: for a box that is empty or outside of the image.
    """
    for box in boxes:
        left, top, right, bottom = box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"A box is (left, top, right, bottom) in shares of the image, 0 to 1; got {tuple(box)}.")
    masks = []
    for height, width in schedule.grids:
        rows, columns = torch.arange(height)[:, None] / height, torch.arange(width) / width
        mask = torch.zeros(height, width, dtype=torch.bool)
        for left, top, right, bottom in boxes:
            mask |= (rows < bottom) & (rows + 1 / height > top) & (columns < right) & (columns + 1 / width > left)
        masks.append(mask.flatten())
    return torch.cat(masks)


def policy_terms(
    log_ratios: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    columns: PrefixColumns,
    level: str = "token",
    epsilon: tuple[float, float] = (0.2, 0.2),
    counted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The terms of the objective for each code.

    Args:
        log_ratios: (B, n) log-ratio of each code, new over old policy.
        advantages: (B,).
        weights: (B, n) from `scale_shares`.
        level: what is clipped: the ratio of each code, the (geometric) mean over a scale's codes, or the product over
            them, which is the ratio of the scale's whole grid (paper, equation 5). At ratio one all three have the same
            gradient.
        epsilon: how far a ratio may be below and above one.
        counted: (B, n) bool, which codes make up the ratio of their scale; default all.

    Returns:
        The terms (B, n), to be summed; the ratios (B, n), and which are clipped (B, n) bool.
    """
    if level != "token":
        counted = columns.occupied if counted is None else counted
        pooled, counts = columns.sums(log_ratios * counted), columns.sums(counted.float()).clamp_min(1)
        if level == "scale_mean":
            pooled = pooled / counts
        else:
            # The product's gradient is a sum over codes, so the weight is divided among them.
            weights = weights / counts[:, columns.scales - 1]
        log_ratios = pooled[:, columns.scales - 1]
    ratios, advantages = log_ratios.exp(), advantages[:, None]
    low, high = epsilon
    terms = torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    is_clipped = ((ratios < 1 - low) & (advantages < 0)) | ((ratios > 1 + high) & (advantages > 0))
    return terms * weights, ratios, is_clipped & columns.occupied


def kl_to_reference(log_probabilities: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL divergence of the policy from the reference, estimated at each sampled code: unbiased, not negative (k3)."""
    difference = reference - log_probabilities
    return difference.exp() - difference - 1
