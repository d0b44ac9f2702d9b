"""Settings of the diffusion decoder's training."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..runs.checked_arguments import SHARE, CheckedArguments


@dataclass
class NextFlowDiffusionTrainingArguments(CheckedArguments, TrainingArguments):
    """`TrainingArguments` and what the diffusion decoder needs; see also [`CheckedArguments`].

    Args:
        condition_dropout: share of the images that are trained without their condition, so that there is an
            unconditional prediction for guidance.
        ema_decay: decay of the averaged weights, which are saved at the end; 0 saves the weights of the last step.
    """

    rules = ((("condition_dropout",), *SHARE),)

    condition_dropout: float = field(default=0.1)
    ema_decay: float = field(default=0.999)
    # Rows have entries that are no arguments of the decoder.
    remove_unused_columns: bool = field(default=False)
