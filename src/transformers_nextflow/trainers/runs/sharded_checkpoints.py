"""Checkpoints of weights that are in parts (FSDP2): each process writes its own, and any number of them reads these."""

from __future__ import annotations

from pathlib import Path

from .atomic_checkpoints import AtomicCheckpointMixin


# What accelerate names the weights in a checkpoint, as the parts of all processes or gathered by the first one.
PARTS, GATHERED = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"


class ShardedCheckpointMixin(AtomicCheckpointMixin):
    """With `fsdp_state_dict_type: SHARDED_STATE_DICT` a checkpoint holds weights, states of the optimizer and averages
    in parts. What `save_model` is asked for is a whole model all the same, gathered by the first process.
    """

    @property
    def _saves_parts(self) -> bool:
        return self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        if self._saves_parts and not self._writes_partial:  # `Trainer` writes nothing then
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        wanted = PARTS if self._saves_parts else GATHERED
        if self.is_fsdp_enabled and not (Path(resume_from_checkpoint) / wanted).exists():
            raise ValueError(
                f"{resume_from_checkpoint} holds no {wanted}, which fsdp_state_dict_type="
                f"{self.accelerator.state.fsdp_plugin.state_dict_type.name} reads; resume with the type of the "
                "training that wrote it."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
