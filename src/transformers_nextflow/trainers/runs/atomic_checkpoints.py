"""Checkpoints that are written atomically, for trainers on `Trainer`."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...utils.atomic_files import swap_folders


PARTIAL = "partial-checkpoint"
# The mark in a checkpoint after a new training, or one resumed from an earlier step, has begun in the same folder.
SUPERSEDED = "superseded"


class AtomicCheckpointMixin:
    """Writes a checkpoint into a folder with a temporary name, and renames it when all processes are done.

    So a kill or a full disk while a checkpoint is written can only lose that one: `resume_from_checkpoint=True` takes
    the newest complete one. An incomplete checkpoint is removed when the next one is begun.
    """

    _writes_partial = False

    def _get_output_dir(self, trial) -> str:
        run_dir = Path(super()._get_output_dir(trial))
        return str(run_dir / PARTIAL if self._writes_partial else run_dir)

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial))
        if self.args.should_save:
            shutil.rmtree(run_dir / PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writes_partial = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writes_partial = False
        self.accelerator.wait_for_everyone()
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        is_best = self.state.best_model_checkpoint == str(run_dir / PARTIAL / name)
        if is_best:  # in all processes, since each of them loads it at the end
            self.state.best_model_checkpoint = str(run_dir / name)
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(run_dir / PARTIAL / name / TRAINER_STATE_NAME))
            self._publish(run_dir, name)
        self.accelerator.wait_for_everyone()

    def _publish(self, run_dir: Path, name: str):
        partial, target = run_dir / PARTIAL / name, run_dir / name
        if target.exists():  # of an earlier training in this folder
            swap_folders(partial, target)
        else:
            partial.rename(target)
        self._rotate(run_dir)
        shutil.rmtree(run_dir / PARTIAL)

    def _rotate(self, run_dir: Path):
        """Delete old checkpoints as transformers does, but superseded ones first, and the others by their steps, since
        checkpoints of the same second cannot be ordered by the times of their files.
        """
        limit = self.args.save_total_limit or 0
        checkpoints = sorted(checkpoints_in(run_dir), key=lambda checkpoint: not is_superseded(checkpoint))
        kept = {checkpoints[-1].name, Path(self.state.best_model_checkpoint or checkpoints[-1]).name}
        surplus = len(checkpoints) - max(limit, len(kept)) if limit > 0 else 0
        for checkpoint in [c for c in checkpoints if c.name not in kept][: max(surplus, 0)]:
            # It is renamed first, so that a partly removed folder does not look like a checkpoint.
            checkpoint.rename(run_dir / PARTIAL / f"surplus-{checkpoint.name}")

    def mark_superseded(self, start: Path | None) -> list[str]:
        """Mark the checkpoints that are no part of the training that now begins, or continues from `start`.

        Returns the names of those that were not marked before.
        """
        folder, names = Path(self.args.output_dir), []
        begun = start is not None and start.resolve().parent == folder.resolve()
        for checkpoint in checkpoints_in(folder):
            if begun and checkpoint.name == start.name:
                (checkpoint / SUPERSEDED).unlink(missing_ok=True)
            elif not is_superseded(checkpoint) and not (begun and step_of(checkpoint) < step_of(start)):
                (checkpoint / SUPERSEDED).touch()
                names.append(checkpoint.name)
        return names

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint of the current training in the folder."""
        own = [c for c in checkpoints_in(self.args.output_dir) if not is_superseded(c)]
        return own[-1] if own else None


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, by their steps."""
    found = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((path for path in found if path.is_dir() and _number_of(path).isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint's folder was written."""
    return int(_number_of(checkpoint))


def _number_of(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")


def is_superseded(checkpoint: Path) -> bool:
    """Whether a later training in the folder, or one resumed from an earlier step, has replaced the checkpoint."""
    return (checkpoint / SUPERSEDED).exists()
