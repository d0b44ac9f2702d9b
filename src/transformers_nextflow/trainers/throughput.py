"""Speed of a training, fill of its batches, and time spent waiting for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from ..configuration_nextflow import NextFlowConfig
from ..sequence.layout import schedules_of
from ..sequence.loss import IGNORE_INDEX
from .packing import CostModel


class ThroughputMeter:
    """Counts positions and time of the steps since the last entry of the log.

    Args:
        config: the config of the model.
        packing, budget: one of `PACKINGS`, and the budget of a pack.
    """

    def __init__(self, config: NextFlowConfig, packing: str = "padding", budget: int | None = None):
        self.config, self.packing, self.budget = config, packing, budget
        self.cost_model = CostModel.from_config(config)
        self._step_start: float | None = None
        self._reset()

    def _reset(self):
        self.seconds = self.data_wait = self.fill = 0.0
        self.positions = self.batches = self.steps = 0

    def time_batches(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Begins a step and yields its batches; counts the waiting time and the positions of each."""
        self._step_start = time.perf_counter()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.data_wait += time.perf_counter() - start
            if batch is None:
                return
            self._add(batch)
            yield batch

    def stop(self):
        """Ends a step."""
        if self._step_start is not None:
            self.seconds += time.perf_counter() - self._step_start
            self.steps += 1
            self._step_start = None

    def _add(self, batch: dict):
        lengths, count = sample_lengths(batch)
        self.positions += sum(lengths)
        self.batches += 1
        if self.packing == "padding":
            self.fill += sum(lengths) / count
        elif self.packing == "length":
            self.fill += sum(lengths) / self.budget
        else:
            trained = int((batch["labels"] != IGNORE_INDEX).sum())
            schedules = schedules_of(batch.get("image_grids"), self.config)
            cost = self.cost_model.of_pack(lengths, trained, schedules, self.config.read_last_scale)
            self.fill += cost / self.budget

    def pop_metrics(self, gather: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """Returns `seconds_per_step`; `tokens_per_second` of all processes, without padding; `fill`, the share of the
        budget, or of padded batches, that samples take; and `data_wait`, the share of the time spent waiting for
        batches. Then counting begins anew.

        Args:
            gather: joins the tensors (5,) of all processes.
        """
        values = [self.seconds, self.data_wait, self.fill, self.positions, self.batches]
        steps = self.steps
        self._reset()
        of_processes = gather(torch.tensor(values, device=device)).view(-1, len(values)).cpu().double()
        seconds, data_wait, fill, positions, batches = of_processes.sum(0).tolist()
        if not batches:
            return {}
        elapsed = seconds / len(of_processes)
        return {
            "seconds_per_step": elapsed / steps,
            "tokens_per_second": positions / elapsed,
            "fill": fill / batches,
            "data_wait": data_wait / seconds,
        }


def sample_lengths(batch: dict) -> tuple[list[int], int]:
    """The positions of each sample of a collator's batch, and of the batch with its padding."""
    count = batch["input_ids"].numel()
    if "seq_idx" in batch:
        samples = batch["seq_idx"][0]
        lengths = samples.bincount()
        # Padding is the last sample, the only one without labels.
        learned = lengths.new_zeros(len(lengths)).index_add(0, samples, (batch["labels"][0] != IGNORE_INDEX).long())
        return lengths[learned > 0].tolist(), count
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(1).tolist(), count
    return [batch["input_ids"].shape[1]] * len(batch["input_ids"]), count
