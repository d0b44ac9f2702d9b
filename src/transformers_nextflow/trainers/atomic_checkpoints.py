"""Checkpoints that are whole or not there, for trainers on `Trainer`."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints


PARTIAL = "partial-checkpoint"


class AtomicCheckpointMixin:
    """Writes a checkpoint into a folder of another name, and gives it its own when all processes are done.

    So a kill or a full disk while a checkpoint is written costs that one alone: `resume_from_checkpoint=True` takes the
    newest, and it is whole. What was left half written goes when the next one is begun.
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
        if self.args.should_save:
            self._publish(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.accelerator.wait_for_everyone()

    def _publish(self, run_dir: Path, name: str):
        partial, target = run_dir / PARTIAL / name, run_dir / name
        if self.state.best_model_checkpoint == str(partial):
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        # There may be one of an earlier training in this folder.
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        shutil.rmtree(run_dir / PARTIAL)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )
