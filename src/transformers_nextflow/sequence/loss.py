"""The loss: cross-entropy of text and codes under one soft-max, codes weighted by scale (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..configuration_nextflow import NextFlowConfig
from ..scale_schedule import ScaleSchedule
from ..utils.user_warnings import warn_user
from .layout import SequenceLayout, scale_weights


IGNORE_INDEX = -100


@dataclass(frozen=True)
class LossWeights:
    """What weighs in the loss beside the scales of images.

    Args:
        text: of a text token; a code weighs 1 on average.
        levels: of the codes of an image, by the resolution of its level; 1 for those that are not named.
        z: of the z-loss, the square of the logarithm of the soft-max's normaliser, beside a position's cross-entropy.
    """

    text: float = 1.0
    levels: Mapping[int, float] = field(default_factory=dict)
    z: float = 0.0

    def check_levels(self, config: NextFlowConfig):
        """Raises `ValueError` for a level that the model does not have."""
        known = config.vq_config.scale_schedules.resolutions
        if strange := sorted(set(self.levels) - set(known)):
            raise ValueError(f"There are weights of the levels {strange}, but the model's are {list(known)}.")

    def of_image(self, schedule: ScaleSchedule, config: NextFlowConfig) -> torch.Tensor:
        """The weight (N,) of each code of an image."""
        by_scales = {count: resolution for resolution, count in config.vq_config.scale_schedules.levels}
        level = self.levels.get(by_scales.get(schedule.num_scales), 1.0)
        return level * scale_weights(schedule, config.scale_loss_alpha)


# Each position weighs the same.
PLAIN = LossWeights()


@dataclass(frozen=True)
class LossTargets:
    """Which positions (B, L) are trained on, and in the order in which the mask selects them, (n,) each:
    the class (text first, then codes), its weight, and its scale (1 … K; 0 for text).
    """

    mask: torch.Tensor
    classes: torch.Tensor
    weights: torch.Tensor
    scales: torch.Tensor


def trained_tokens(
    input_ids: torch.Tensor, labels: torch.Tensor, predictors: torch.Tensor, config: NextFlowConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch trains on: which text tokens (B, L), and which images (num_images,) in order of appearance.

    Those with a label that something predicts; an image has its label at its `<eoi>`. Nothing predicts a slot or
    `<eoi>`: they follow from the schedule.
    """
    predicted = predictors >= 0
    trained = predicted & (labels != IGNORE_INDEX)
    ends = predicted & (input_ids == config.eoi_token_id)
    return trained & ~ends & (input_ids != config.image_token_id), trained[ends]


def num_trained_positions(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    predictors: torch.Tensor,
    schedules: Sequence[ScaleSchedule],
    config: NextFlowConfig,
) -> torch.Tensor:
    """How many positions () int64 the loss of a batch is averaged over: trained text tokens, and codes of images."""
    text, images = trained_tokens(input_ids, labels, predictors, config)
    return text.sum() + sum(schedule.num_tokens for schedule, on in zip(schedules, images.tolist()) if on)


def loss_targets(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    image_labels: torch.Tensor | None,
    layout: SequenceLayout,
    schedules: Sequence[ScaleSchedule],
    config: NextFlowConfig,
    loss_weights: LossWeights = PLAIN,
) -> LossTargets:
    """Targets of a batch, of what `trained_tokens` names.

    A text token is the class of the position that predicts it. `<boi>` and slots predict their own scale's codes,
    unshifted.
    """
    text, images = trained_tokens(input_ids, labels, layout.predictors, config)
    mask, classes, scales = torch.zeros_like(text), torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    rows, columns = text.nonzero(as_tuple=True)
    predictors = layout.predictors[rows, columns]
    mask[rows, predictors], classes[rows, predictors] = True, labels[rows, columns]
    weights = loss_weights.text * mask.float()
    if schedules:
        place, device = layout.predicting_mask, labels.device
        counts = torch.tensor([schedule.num_tokens for schedule in schedules], device=device)
        codes = torch.cat([row[: s.num_tokens] for row, s in zip(image_labels, schedules)])
        scale = [k for s in schedules for k, count in enumerate(s.tokens_per_scale, 1) for _ in range(count)]
        mask[place] = images.repeat_interleave(counts)
        classes[place] = codes.to(device) + config.text_config.vocab_size
        weights[place] = torch.cat([loss_weights.of_image(s, config) for s in schedules]).to(device)
        scales[place] = torch.tensor(scale, device=device)
    return LossTargets(mask, classes[mask], weights[mask], scales[mask])


def warn_of_miscounting(labels: torch.Tensor, targets: LossTargets):
    """Warns where (B, L) labels are other than one for each trained position, so that counting them miscounts."""
    if int((labels[:, 1:] != IGNORE_INDEX).sum()) != len(targets.classes):
        warn_user(
            "A batch has more or fewer labels than trained positions. A num_items_in_batch that counts labels, as that "
            "of transformers' Trainer does, then gives another loss than the undivided batch; NextFlowTrainer counts "
            "trained positions, and NextFlowCollator gives one label to each.",
        )


def nextflow_loss(
    total: torch.Tensor,
    losses: torch.Tensor,
    correct: torch.Tensor,
    targets: LossTargets,
    num_scales: int,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> dict[str, torch.Tensor]:
    """Losses from the weighted sum () of all and from each cross-entropy (n,), at the trained positions.

    `correct` (n,) tells which positions give their class the highest probability of all.

    Returns `loss` (the sum over the number of trained positions, or over `num_items_in_batch`), `mean_loss` (over the
    batch's own trained positions), `text_loss` and `image_loss` (means over text tokens, weighted over codes),
    `scale_losses` (num_scales,) unweighted means, and `text_accuracy` and `scale_accuracies` (num_scales,), shares of
    correct ones; NaN where a batch has nothing of the kind; `num_trained` (1 + num_scales,), how many positions these
    run over. Only `loss` has a gradient.
    """
    losses = losses.detach()
    is_code = targets.scales > 0
    count = len(losses) if num_items_in_batch is None else num_items_in_batch
    per_scale = torch.zeros(num_scales + 1, device=losses.device)
    sums = per_scale.index_add(0, targets.scales, losses)
    counts = per_scale.index_add(0, targets.scales, torch.ones_like(losses))
    accuracies = per_scale.index_add(0, targets.scales, correct.to(losses.dtype)) / counts
    return {
        "loss": total / torch.as_tensor(count, device=total.device).clamp_min(1),
        "mean_loss": total.detach() / len(losses),
        "text_loss": losses[~is_code].mean(),
        "image_loss": (losses * targets.weights)[is_code].mean(),
        "scale_losses": (sums / counts)[1:],
        "text_accuracy": accuracies[0],
        "scale_accuracies": accuracies[1:],
        "num_trained": counts.long(),
    }
