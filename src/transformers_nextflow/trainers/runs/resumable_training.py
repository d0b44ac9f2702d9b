"""Exact resuming: a training continues from a checkpoint unchanged, ends once, and locks its folder."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ...utils.folder_lock import lock_folder
from ...utils.typed_values import check_finite
from .atomic_checkpoints import PARTIAL, AtomicCheckpointMixin, checkpoints_in, is_superseded
from .training_record import changes_since, training_record, write_record


logger = logging.get_logger(__name__)


class _AlreadyFinished(Exception):
    """The training is already at its last step."""


class ResumableTrainingMixin(AtomicCheckpointMixin):
    """For trainers on `Trainer` with [`CheckedArguments`].

    Each checkpoint holds a record of all else on which the result depends. `resume_from_checkpoint` compares the
    records and refuses changes that would change the result, unless `resume_with_changes` is set. Only one training at
    a time writes to a folder.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        groups = [] if self.optimizer is None else _settings_of(self.optimizer)
        self._given_optimizer = [type(self.optimizer).__name__, groups, type(self.lr_scheduler).__name__]
        self._record: dict[str, Any] = {}
        self._start: Path | None = None
        self._has_changed = False

    def record_extras(self) -> dict[str, Any]:
        """What a training's result depends on, besides arguments, data, model and processor, by name."""
        return {}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As [`~transformers.Trainer.train`]. A training that is already at its last step does not change.

        Raises:
            ValueError: if another training is writing to the folder; for a checkpoint that is missing, superseded by a
                later training in its folder, or of a training that differs from this one; and if a number is not
                finite.
        """
        self.args.check_values()
        with self._lock_output_dir():
            self._start = self._checkpoint(resume_from_checkpoint)
            self._has_changed = self._compare_with_checkpoint()
            try:
                output = super().train(None if self._start is None else str(self._start), *args, **kwargs)
            except _AlreadyFinished:
                return self._finished()
            self.check_weights()
            return output

    @contextmanager
    def _lock_output_dir(self) -> Iterator[None]:
        """Lock the folder for all processes of a training; the process that writes holds the lock."""
        with ExitStack() as held:
            refusal = None
            try:
                if self.args.should_save:
                    held.enter_context(lock_folder(self.args.output_dir))
            except ValueError as error:
                refusal = str(error)
            if refusals := [text for text in gather_object([refusal]) if text is not None]:
                raise ValueError(refusals[0])
            yield

    def last_checkpoint(self) -> Path | None:
        return super().last_checkpoint() or self._start

    def _checkpoint(self, asked: str | bool | None) -> Path | None:
        if not asked:
            return None
        if asked is not True:
            if not (Path(asked) / TRAINER_STATE_NAME).is_file():
                raise ValueError(f"{asked} is not a checkpoint to resume from; it has no {TRAINER_STATE_NAME}.")
            return Path(asked)
        found = checkpoints_in(self.args.output_dir)
        if not found:
            raise ValueError(
                f"There is no checkpoint in {self.args.output_dir} to resume from; train without resuming."
            )
        if is_superseded(found[-1]):
            raise ValueError(
                f"{found[-1]} is of an earlier training in this folder than the latest one; remove it, or "
                "name the checkpoint to resume from."
            )
        return found[-1]

    def _compare_with_checkpoint(self) -> bool:
        """Make the record; returns whether changes since the checkpoint, which were allowed, will change the result.

        Only the first process does so, since others may have no rows yet.
        """
        changes: tuple[list[str], list[str]] = ([], [])
        if self.args.should_save or self.is_world_process_zero():
            extras = {"optimizer": self._given_optimizer} | self.record_extras()
            self._record = training_record(self, extras)
            if self._start is not None:
                changes = changes_since(self._start, self._record)
        decisive, harmless = broadcast_object_list([changes])[0]
        if decisive and not self.args.resume_with_changes:
            raise ValueError(
                f"Resuming from {self._start} would give another result than the training that wrote it: "
                f"{'; '.join(decisive)}. Resume with what it had, start a new training, or set "
                "resume_with_changes=True to resume with the changes."
            )
        if decisive or harmless:
            logger.warning(f"Resuming from {self._start} with changes: {'; '.join(decisive + harmless)}.")
        return bool(decisive)

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        # All is loaded, but no callback and no evaluation has run yet.
        if self.state.global_step >= self.state.max_steps:
            raise _AlreadyFinished
        check_finite({"optimizer": _settings_of(self.optimizer)})
        self.check_weights(at_start=True)
        if self.args.should_save and (superseded := self.mark_superseded(self._start)):
            logger.warning(
                f"{', '.join(superseded)} in {self.args.output_dir} belong to an earlier training; new ones "
                "take their places."
            )
        return prepared

    def _finished(self) -> TrainOutput:
        self.is_in_train = False
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        logger.warning(
            f"The training is already at its last step, {self.state.global_step}; there is nothing to train."
        )
        return TrainOutput(self.state.global_step, statistics.fmean(losses) if losses else math.nan, {})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        settings, scheduler = _settings_of(self.optimizer), self.lr_scheduler
        rates = getattr(scheduler, "base_lrs", None)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._has_changed:
            return
        # The states contain the old settings, which are replaced by the new ones.
        for group, values in zip(self.optimizer.param_groups, settings):
            group |= values
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = rates
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            scheduler._last_lr = [rate * factor for rate, factor in zip(rates, factors)]
            for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr):
                group["lr"] = rate

    def _publish(self, run_dir: Path, name: str):
        write_record(self._record, run_dir / PARTIAL / name)
        super()._publish(run_dir, name)


def _settings_of(optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
