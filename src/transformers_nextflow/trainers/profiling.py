"""Profiling of a training: some of its steps are measured with `torch.profiler`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback

from ..utils.atomic_files import atomic_write


SKIPPED_STEPS, MEASURED_STEPS = 3, 3
ROWS = 60


class ProfiledSteps(TrainerCallback):
    """Measures `MEASURED_STEPS` steps after the first `SKIPPED_STEPS`, in the first process.

    `trace.json` in the folder opens in Perfetto or chrome://tracing; `operations.txt` is a table of the operations that
    took longest.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._profile: profile | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        steps = schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=MEASURED_STEPS, repeat=1)
        self._profile = profile(activities=activities, schedule=steps, on_trace_ready=self._write, record_shapes=True)
        self._profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._profile is not None:
            self._profile.step()

    def on_train_end(self, args, state, control, **kwargs):
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, measured: profile):
        self.folder.mkdir(parents=True, exist_ok=True)
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        with atomic_write(self.folder / "operations.txt") as partial:
            partial.write_text(measured.key_averages().table(sort_by=order, row_limit=ROWS) + "\n")
        with atomic_write(self.folder / "trace.json") as partial:
            measured.export_chrome_trace(str(partial))
