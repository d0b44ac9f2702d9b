"""The loss: cross-entropy of text and codes under one softmax, codes weighted by scale (paper, section 3.1)."""

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
    """Weights in the loss, in addition to the weights of scales.

    Args:
        text: weight of a text token; a code has the weight 1 on average.
        levels: weights of the codes of an image, by the resolution of its level; 1 for levels that are not named.
        z: weight of the z-loss, the square of the logarithm of the softmax's normaliser, which is added to each
            position's cross-entropy.
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


# All weights are one.
PLAIN = LossWeights()


@dataclass(frozen=True)
class LossTargets:
    """The mask (B, L) of the positions that are trained on, and in the order in which it selects them, (n,) each:
    the class (text first, then codes), its weight, and its scale (1 … K; 0 for text).
    """

    mask: torch.Tensor
    classes: torch.Tensor
    weights: torch.Tensor
    scales: torch.Tensor


def trained_tokens(
    input_ids: torch.Tensor, labels: torch.Tensor, predictors: torch.Tensor, config: NextFlowConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch trains on: a mask (B, L) of text tokens, and one (num_images,) of images in order of appearance.

    These have a label, and a position that predicts them; the label of an image is that of its `<eoi>`. Nothing
    predicts slots or `<eoi>`, since they follow from the schedule.
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
    """The number () int64 of positions over which the loss of a batch is averaged: trained text tokens and codes."""
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
    """The targets of a batch for the tokens and images of `trained_tokens`.

    A text token is the target of the position that predicts it. `<boi>` and slots predict the codes of their own scale,
    without a shift.

    Raises:
        ValueError: for trained labels that are no tokens of the vocabulary, or no codes of the codebook, and for codes
            that are not those of the images.
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
        if image_labels.shape[0] != len(schedules) or image_labels.shape[1] < max(s.num_tokens for s in schedules):
            raise ValueError(
                f"The codes to predict (image_labels, or else image_tokens) are {tuple(image_labels.shape)}, but there "
                f"are {len(schedules)} images of up to {int(counts.max())} codes."
            )
        codes = torch.cat([row[: s.num_tokens] for row, s in zip(image_labels, schedules)])
        scale = [k for s in schedules for k, count in enumerate(s.tokens_per_scale, 1) for _ in range(count)]
        mask[place] = images.repeat_interleave(counts)
        classes[place] = codes.to(device) + config.text_config.vocab_size
        weights[place] = torch.cat([loss_weights.of_image(s, config) for s in schedules]).to(device)
        scales[place] = torch.tensor(scale, device=device)
    targets = LossTargets(mask, classes[mask], weights[mask], scales[mask])
    _check_classes(targets, config)
    return targets


def _check_classes(targets: LossTargets, config: NextFlowConfig):
    """Raises `ValueError` for labels out of range: in one softmax, a code -1 would be a text token, and a text token
    beyond the vocabulary a code.
    """
    is_code, vocab_size = targets.scales > 0, config.text_config.vocab_size
    sizes = torch.where(is_code, config.vq_config.codebook_size, vocab_size)
    labels = targets.classes - vocab_size * is_code
    strange = (labels < 0) | (labels >= sizes)
    if bool(strange.any()):
        label, size, of_image = (int(values[strange][0]) for values in (labels, sizes, is_code))
        name = "The codes to predict (image_labels, or else image_tokens)" if of_image else "The labels of text"
        raise ValueError(f"{name} run from 0 to {size - 1}, got {label}; do they come from another tokenizer?")


def warn_of_miscounting(labels: torch.Tensor, targets: LossTargets):
    """Warns if the number of labels (B, L) differs from that of trained positions: `Trainer` divides by the former."""
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
    """Losses from the weighted sum () of all losses and the cross-entropies (n,) at the trained positions.

    `correct` (n,) says which positions give their class the highest probability of all.

    Returns `loss` (the sum, divided by the number of trained positions or by `num_items_in_batch`), `mean_loss` (the
    mean over the batch's own trained positions), `text_loss` and `image_loss` (means over text tokens, weighted over
    codes), `scale_losses` (num_scales,) unweighted means, and `text_accuracy` and `scale_accuracies` (num_scales,),
    shares of correct positions; a mean over no positions is NaN; `num_trained` (1 + num_scales,), the numbers of
    positions in these means. Only `loss` has a gradient.
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
