"""Requirements of a training on weights: trained weights in float32, and the vision tokenizer not sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import TrainingArguments


def check_trained_weights(model: nn.Module, args: TrainingArguments):
    """Raises `ValueError` for trainable weights in half precision, in which small steps would be lost to rounding.

    Mixed precision (`bf16`, `fp16`) casts float32 weights itself. DeepSpeed keeps its own float32 copies.
    """
    if args.deepspeed_plugin is not None:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, and small steps would be rounded away: "
                "weights that are trained are float32, under mixed precision too. Load the model with "
                "from_pretrained(..., dtype=torch.float32), or freeze what rests."
            )


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are sharded (FSDP, ZeRO 3), so that no process has the whole model."""
    return any(hasattr(weight, "placements") or hasattr(weight, "ds_id") for weight in model.parameters())


@contextmanager
def gathered_weights(model: nn.Module, reshard_after_forward: bool = True) -> Iterator[None]:
    """During the block every process has all weights that FSDP2 shards, so each can run the model any number of times
    and in parts without waiting for others; does nothing for a model that is not sharded.

    Args:
        reshard_after_forward: the setting of the modules after the block.
    """
    modules = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
    if modules:
        model(inside=lambda _: None)  # FSDP2 takes the module that is called first for the root
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(reshard_after_forward, recurse=False)


class TrainedInFloat32Mixin:
    """For trainers on `Trainer`: refuses trainable weights in half precision, and models without trainable weights."""

    def create_optimizer(self, *args, **kwargs):
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("All weights are frozen, so nothing would be trained; set requires_grad of some.")
        check_trained_weights(self.model, self.args)
        return super().create_optimizer(*args, **kwargs)


def place_vision_tokenizer(trainer):
    """Move the tokenizer to the device of a trainer whose model FSDP shards: FSDP moves only weights that it shards.

    Raises:
        ValueError: if accelerate would load the weights only on the first process and distribute only sharded ones.
    """
    if not trainer.is_fsdp_enabled:
        return
    if trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading spreads sharded weights only, and the vision tokenizer is not sharded; set "
            "it to false."
        )
    trainer.model.vq_model.to(trainer.args.device)
