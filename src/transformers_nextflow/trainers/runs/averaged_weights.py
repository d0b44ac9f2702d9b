"""An exponential moving average (EMA) of the trained weights, saved and resumed with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed_checkpoint
from transformers import TrainerCallback
from transformers.utils import logging

from .sharded_checkpoints import ShardedCheckpointMixin
from .trained_weights import is_sharded, local_shard


logger = logging.get_logger(__name__)
# The subfolder in which `save_model` writes the averages as a separate model.
FOLDER = "ema"
# In a checkpoint: whole, or a folder with the parts of all processes.
FILE, PARTS = "ema.safetensors", "ema_parts"
# Beside them: how many steps the averages hold.
NUM_AVERAGED = "num_averaged"


class AveragedWeightsMixin(ShardedCheckpointMixin):
    """For trainers on `Trainer` with [`CheckedArguments`]: `ema_decay` above 0 keeps an average of each trained weight,
    in float32 on its device; of sharded weights each process averages its own part. The decay is (1 + n) / (10 + n)
    after n steps until it reaches `ema_decay`, so that an average forgets the initial weights.

    A checkpoint holds the averages as one more state, of sharded weights in parts that any number of processes reads.
    `load_best_model_at_end` loads those of the best checkpoint with its weights. `save_model` writes them as a model of
    its own into `ema/`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._averages: dict[str, torch.Tensor] = {}
        self._num_averaged = 0
        if self.args.ema_decay:
            if self.is_deepspeed_enabled:
                raise ValueError(
                    f"ema_decay={self.args.ema_decay}: DeepSpeed does not expose its weights; set it to 0."
                )
            self.add_callback(_AfterEachStepCallback(self._update_averages))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """During the block the weights of the model are their averages, if there are any."""
        if not self._averages:
            yield
            return
        self._swap_with_averages()
        try:
            yield
        finally:
            self._swap_with_averages()

    @torch.no_grad()
    def restart_averages(self, prefix: str, rows: torch.Tensor | None = None):
        """For weights that were set and not learned: the averages of those whose names begin with `prefix` become the
        weights, in the marked rows or in all.
        """
        for name, weight in self._trained_weights() if self._averages else ():
            if name.startswith(prefix):
                marked = slice(None) if rows is None else rows
                self._averages[name][marked] = weight[marked]

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._begin_averages(self._start)
        return prepared

    def _rewind(self, checkpoint: Path):
        super()._rewind(checkpoint)
        self._begin_averages(checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._begin_averages(Path(self.state.best_model_checkpoint))

    def _begin_averages(self, checkpoint: Path | None):
        """Take the averages of a checkpoint, or the weights as they are now."""
        if self.args.ema_decay:
            self._averages.clear()  # so that there is room for new ones
            self._averages |= {name: weight.clone() for name, weight in self._trained_weights()}
            self._num_averaged = 0
            if checkpoint is not None:
                self._load_averages(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        if self._averages and not _internal_call:
            with self.averaged_weights():
                super().save_model(str(Path(output_dir or self.args.output_dir) / FOLDER), _internal_call=True)

    def _save_optimizer_and_scheduler(self, output_dir: str):
        super()._save_optimizer_and_scheduler(output_dir)
        if not self._averages:
            return
        if is_sharded(self.model):
            distributed_checkpoint.save(self._state(), checkpoint_id=Path(output_dir) / PARTS)
        elif self.args.should_save:
            save_file(self._averages, Path(output_dir) / FILE, {NUM_AVERAGED: str(self._num_averaged)})

    def _load_averages(self, checkpoint: Path):
        path = checkpoint / (PARTS if is_sharded(self.model) else FILE)
        if not path.exists():  # resumed with changes
            logger.warning(f"{checkpoint} holds no averages of the weights: they begin with its weights.")
        elif is_sharded(self.model):
            distributed_checkpoint.load(state := self._state(), checkpoint_id=path)
            self._num_averaged = int(state[NUM_AVERAGED])
        else:
            with safe_open(path, "pt") as found:
                self._num_averaged = int(found.metadata()[NUM_AVERAGED])
                for name, average in self._averages.items():
                    average.copy_(found.get_tensor(name))

    def _state(self) -> dict[str, torch.Tensor]:
        return self._averages | {NUM_AVERAGED: torch.tensor(self._num_averaged)}

    def _trained_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                yield name, weight.detach()

    @torch.no_grad()
    def _update_averages(self):
        if not self._skips_step:
            weights = [local_shard(weight) for _, weight in self._trained_weights()]
            decay = min(self.args.ema_decay, (1 + self._num_averaged) / (10 + self._num_averaged))
            torch._foreach_lerp_([local_shard(average) for average in self._averages.values()], weights, 1 - decay)
            self._num_averaged += 1

    @torch.no_grad()
    def _swap_with_averages(self):
        for name, weight in self._trained_weights():
            weight, average = local_shard(weight), local_shard(self._averages[name])
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)


class _AfterEachStepCallback(TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.call()
