"""Settings that all trainers share, and the check of all numbers before a training begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import ClassVar

import torch
from transformers import SchedulerType
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig

from ...utils.known_names import check_names
from ...utils.typed_values import check_finite
from .gradient_spikes import SPIKE_RULES


Rule = tuple[tuple[str, ...], Callable[[Real], bool], str]
NOT_NEGATIVE = (lambda value: value >= 0, "be at least 0")
FROM_ONE = (lambda value: value >= 1, "be at least 1")
SHARE = (lambda value: 0 <= value <= 1, "lie in [0, 1]")

# Arguments that `TrainingArguments` does not check.
RULES: tuple[Rule, ...] = (
    (("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "max_nonfinite_steps"), *NOT_NEGATIVE),
    (("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), *FROM_ONE),
    (("save_total_limit",), *FROM_ONE),
    (("max_steps",), lambda value: value >= -1 and value % 1 == 0, "be a whole number from 0, or -1 for whole epochs"),
    (("save_steps", "logging_steps"), lambda value: value > 0, "be more than 0"),
    (("adam_beta1", "adam_beta2", "ema_decay"), lambda value: 0 <= value < 1, "lie in [0, 1)"),
    (("spike_factor",), lambda value: value > 1, "be more than 1"),
    (("adam_epsilon",), lambda value: value > 0, "be positive"),
)
# As `TrainingArguments` has turned truth values into words.
TOKEN_COUNTS = ("no", "all", "non_padding")


@dataclass
class CheckedArguments:
    """Arguments of all trainers; must come before `TrainingArguments`, or a subclass of it, in the bases of a class.

    Args:
        max_nonfinite_steps: how many steps whose loss or gradient is not finite are skipped, each with a warning,
            before the next one ends the training with an error. A skipped step changes no weight; the log has its loss
            as it was computed, and counts `nonfinite_steps`. Default: the first such step ends the training.
        spike_factor: a step is a spike if the norm of its gradient is more than this many medians of the last 100
            steps; `None`: spikes are not looked for. The log counts `gradient_spikes`.
        on_spike: "count" takes the step; "skip" skips it; "rewind" skips it and returns to the weights and the
            optimizer's states of the newest checkpoint, while data and learning rate continue: the updates since then
            are lost.
        ema_decay: above 0 an average of the weights is kept, which each step moves towards the weights by a share
            `1 - ema_decay` of the difference. Skipped steps do not count.
        resume_with_changes: continue from a checkpoint although something differs from the training that wrote it, or a
            part of it is missing, so that the result is not that of an uninterrupted training. Differences are logged.
        logging_nan_inf_filter: only `False`: losses are logged as they were computed.

    Raises:
        ValueError: for a number that is not finite or out of its range; the message names it.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()

    max_nonfinite_steps: int = field(default=0)
    spike_factor: float | None = field(default=None)
    on_spike: str = field(default="skip", metadata={"choices": SPIKE_RULES})
    ema_decay: float = field(default=0.0)
    resume_with_changes: bool = field(default=False)
    logging_nan_inf_filter: bool = field(default=False)

    def __post_init__(self):
        if isinstance(self.accelerator_config, dict):
            check_names(self.accelerator_config, [f.name for f in fields(AcceleratorConfig)], "accelerator_config")
        super().__post_init__()
        # True by default also where there is nothing to pin memory for, of which torch warns.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        self.check_values()

    def check_values(self):
        """Raises `ValueError` for values with which no training is possible."""
        check_finite({f.name: getattr(self, f.name) for f in fields(self)})
        for name in ("cp_size", "sp_size"):
            if (size := getattr(self.parallelism_config, name, 1)) > 1:
                raise ValueError(
                    f"parallelism_config.{name}={size}: sequences are laid out as a whole, so no process trains on "
                    "a part of one; leave it at 1."
                )
        for names, is_valid, demand in (*RULES, *self.rules):
            for name in names:
                value = getattr(self, name)
                if value is not None and not (isinstance(value, Real) and is_valid(value)):
                    raise ValueError(f"{name} must {demand}, got {value!r}.")
        for name, choices in self._choices().items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
        if self.spike_factor is not None and self.on_spike == "rewind" and self.save_only_model:
            raise ValueError(
                "on_spike='rewind' goes back to the optimizer's states of a checkpoint; leave out save_only_model."
            )
        if self.ema_decay and self.load_best_model_at_end and self.save_only_model:
            raise ValueError(
                "load_best_model_at_end loads the averages (ema_decay) of the best checkpoint too; leave out "
                "save_only_model, with which checkpoints hold none."
            )
        self._check_parts()
        if self.logging_nan_inf_filter:
            raise ValueError(
                "logging_nan_inf_filter=True would log a loss of 0 in place of one that is not finite; leave it out."
            )

    def _choices(self) -> dict[str, tuple]:
        """What may be chosen by name; transformers takes anything, and passes over what it does not know."""
        own = {f.name: tuple(f.metadata["choices"]) for f in fields(self) if f.metadata.get("choices")}
        return {"include_num_input_tokens_seen": TOKEN_COUNTS} | {
            name: choices for name, choices in own.items() if isinstance(getattr(self, name), str)
        }

    def _check_parts(self):
        """Raises `ValueError` for settings of the learning rate's schedule that it does not take."""
        known = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(self.lr_scheduler_type)]).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        if isinstance(self.lr_scheduler_kwargs, dict) and not takes_any:
            check_names(self.lr_scheduler_kwargs, sorted(known), f"lr_scheduler_type {self.lr_scheduler_type}")
