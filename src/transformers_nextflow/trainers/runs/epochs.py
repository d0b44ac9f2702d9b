"""A callback that sets the epoch of rows and samplers that differ by epochs."""

from __future__ import annotations

from typing import Protocol

from transformers import TrainerCallback, TrainerState


def epoch_of(state: TrainerState) -> int:
    """The number of the epoch that begins or goes on, from 0; that of the state is a rounded fraction."""
    return int((state.epoch or 0) + 1e-6)


class SupportsSetEpoch(Protocol):
    """Rows or a sampler."""

    def set_epoch(self, epoch: int): ...


class SetEpochCallback(TrainerCallback):
    """Tells rows or a sampler which epoch begins, also where a training is resumed within one.

    accelerate tells samplers that it finds, which it does not in several processes, and data sets in one process only.
    """

    def __init__(self, target: SupportsSetEpoch):
        self.target = target

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.target.set_epoch(epoch_of(state))
