"""Ends a training, or skips a step, when a number is not finite or a gradient is far too large."""

from __future__ import annotations

import copy
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers.utils import logging

from ...utils.typed_values import check_finite
from .gradient_spikes import WINDOW, GradientSpikes
from .trained_weights import local_shard


logger = logging.get_logger(__name__)
GRADIENT_NORM = "the norm of the gradient"
# The entry for these counts in the state of a trainer, `trainer_state.json`.
STATE = "finite_training"


class FiniteTrainingMixin:
    """For trainers on `Trainer` with [`CheckedArguments`]: weights, losses and gradients stay finite, or training ends.

    The losses of a step, the terms of them that a trainer notes, and the norm of the gradient are checked once before
    each step of the optimizer, which copies one number from the device. The weights are checked before training, before
    each checkpoint and `save_model`, and at the end. `spike_factor` finds finite gradients that are far too large. The
    counts are saved and resumed.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.accelerator.unwrap_model(self.model).config
        check_finite({"config": config if isinstance(config, dict) else config.to_dict()})
        for name in ("max_nonfinite_steps", "spike_factor"):
            if (value := getattr(self.args, name)) and self.is_deepspeed_enabled:
                raise ValueError(
                    f"{name}={value}: DeepSpeed takes its steps before a gradient can be checked; leave it out."
                )
        self._noted: list[tuple[str, torch.Tensor]] = []
        self._num_nonfinite_steps = self._num_spikes = 0
        self._spikes = GradientSpikes(self.args.spike_factor) if self.args.spike_factor else None
        # Whether the current step is skipped.
        self._skips_step = False

    def note(self, terms: dict[str, torch.Tensor]):
        """Note named terms of the current loss, each of which must be finite; does nothing in evaluation."""
        if self.model.training:
            self._noted += [(name, value.detach()) for name, value in terms.items()]

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.note({"loss": loss})
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        # The last method that `Trainer` calls before the optimizer's step.
        norm = super()._get_grad_norm(model, grad_norm)
        noted, self._noted, self._skips_step = self._noted, [], False
        if norm is not None and not self._has_loss_scale():
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
            noted.append((GRADIENT_NORM, whole))
        finite = torch.stack([value.float().sum().to(self.args.device) for _, value in noted]).isfinite()
        if self._on_any_process(~finite.all()):
            self._skip_step_or_raise(model, [name for (name, _), is_finite in zip(noted, finite) if not is_finite])
        elif self._spikes is not None and noted[-1][0] == GRADIENT_NORM:
            is_spike = self._spikes.is_spike(float(noted[-1][1]))
            if self._on_any_process(torch.tensor(is_spike, device=self.args.device)):
                self._handle_spike(model)
        return norm

    def _handle_spike(self, model: nn.Module):
        self._num_spikes += 1
        rule, step = self.args.on_spike, self.state.global_step + 1
        before = list(self._spikes.norms)[:-1]
        what = (
            f"Step {step}: {GRADIENT_NORM} is {self._spikes.norms[-1]:.3g}, the median before it "
            f"{statistics.median(before):.3g}."
        )
        if rule == "count":
            logger.warning(f"{what} The step is taken, as on_spike='count' says.")
            return
        self._skip_step(model)
        checkpoint = self.last_checkpoint() if rule == "rewind" else None
        if checkpoint is None:
            logger.warning(f"{what} The step is skipped{'; there is no checkpoint yet' if rule == 'rewind' else ''}.")
            return
        self._rewind(checkpoint)
        logger.warning(f"{what} The step is skipped, and training continues with the weights of {checkpoint}.")

    def _skip_step(self, model: nn.Module):
        model.zero_grad()  # the optimizer does not change weights without a gradient
        self._skips_step = True

    def _rewind(self, checkpoint: Path):
        """Load weights and states of the optimizer from the checkpoint; the learning rate does not change."""
        schedule = copy.deepcopy(self.lr_scheduler.state_dict())
        self._load_from_checkpoint(str(checkpoint), self.model_wrapped if self.is_fsdp_enabled else None)
        self._load_optimizer_and_scheduler(str(checkpoint))
        self.lr_scheduler.load_state_dict(schedule)

    def _save_checkpoint(self, *args, **kwargs):
        norms = [] if self._spikes is None else list(self._spikes.norms)
        self.state.stateful_callbacks[STATE] = {
            "nonfinite_steps": self._num_nonfinite_steps,
            "gradient_spikes": self._num_spikes,
            "norms": norms,
        }
        super()._save_checkpoint(*args, **kwargs)

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        state = self.state.stateful_callbacks.get(STATE, {})
        self._num_nonfinite_steps = state.get("nonfinite_steps", 0)
        self._num_spikes = state.get("gradient_spikes", 0)
        if self._spikes is not None:
            self._spikes.norms = deque(state.get("norms", ()), maxlen=WINDOW)
        return prepared

    def _has_loss_scale(self) -> bool:
        """Whether float16 gradients overflow only because of their scale; then the scaler skips the step itself."""
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler is not None and scaler.get_scale() > 1

    def _skip_step_or_raise(self, model: nn.Module, names: list[str]):
        step, limit = self.state.global_step + 1, self.args.max_nonfinite_steps
        names = list(dict.fromkeys(gather_object(names)))
        # The total loss and the gradient add nothing to the names of the terms.
        names = [n for n in names if n not in ("loss", GRADIENT_NORM)] or names[:1]
        what = f"Step {step}: {' and '.join(names)} {'is' if len(names) == 1 else 'are'} not finite."
        self._num_nonfinite_steps += 1
        if self._num_nonfinite_steps > limit:
            before = f" {limit} such steps were skipped before (max_nonfinite_steps)." if limit else ""
            raise ValueError(
                f"{what}{before} {self._last_good_checkpoint()} Look at the rows of this step, or lower the learning "
                "rate; max_nonfinite_steps skips a few such steps."
            )
        logger.warning(f"{what} It is skipped, number {self._num_nonfinite_steps} of at most {limit}.")
        self._skip_step(model)

    def _last_good_checkpoint(self) -> str:
        checkpoint = self.last_checkpoint()
        return f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."

    def check_weights(self, at_start: bool = False):
        """Raises `ValueError` that names weights that are not finite, and the last good checkpoint."""
        weights = list(self.model.named_parameters())
        # Every process has all weights; if they are sharded, all processes run this check.
        broken = not are_finite(weight for _, weight in weights)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            broken = self._on_any_process(torch.tensor(broken, device=self.args.device))
        if broken:
            names = [name for name, weight in weights if not are_finite([weight])]
            what = f"{len(names)} weights are not finite, {', '.join(names[:3])} among them"
            if at_start:
                raise ValueError(f"Before the first step {what}; check the checkpoint that they were loaded from.")
            raise ValueError(
                f"After step {self.state.global_step} {what}; they are not saved. {self._last_good_checkpoint()} "
                "Lower the learning rate."
            )

    def _on_any_process(self, flag: torch.Tensor) -> bool:
        return bool(self.accelerator.reduce(flag.float(), "sum"))

    def save_model(self, *args, **kwargs):
        self.check_weights()
        super().save_model(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs and self._spikes is not None:
            logs["gradient_spikes"] = self._num_spikes
        if "loss" in logs and self._num_nonfinite_steps:
            logs["nonfinite_steps"] = self._num_nonfinite_steps
            # `Trainer` subtracts the logged sum from itself, which leaves NaN if it was not finite.
            self._tr_loss = torch.zeros_like(self._tr_loss)
        super().log(logs, *args, **kwargs)


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers of all tensors are finite; of sharded ones those of this process."""
    flags = []
    for tensor in tensors:
        tensor = local_shard(tensor)
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel() and not tensor.is_meta:
            # NaN becomes both extremes, and no temporary tensor of the same size is needed.
            flags.append(torch.stack(tensor.detach().aminmax()).isfinite().all())
    device = flags[0].device if flags else "cpu"
    return not flags or bool(torch.stack([flag.to(device) for flag in flags]).all())
