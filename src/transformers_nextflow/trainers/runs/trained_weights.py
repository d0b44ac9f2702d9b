"""Requirements of a training on weights: trained weights in float32, and the vision tokenizer not sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate.state import AcceleratorState
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
                "from_pretrained(..., dtype=torch.float32), or freeze the rest."
            )


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are sharded (FSDP, ZeRO 3), so that no process has the whole model."""
    return any(hasattr(weight, "placements") or hasattr(weight, "ds_id") for weight in model.parameters())


def local_shard(weight: torch.Tensor) -> torch.Tensor:
    """What this process has of a weight, in the same memory."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """All weights on every process that FSDP2 has in parts, so that each reads the model as often and in whatever parts
    it wants to, without waiting for others; does nothing for a model that is whole.
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
        plugin = getattr(AcceleratorState(), "fsdp_plugin", None) if modules else None
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(plugin is None or bool(plugin.reshard_after_forward), recurse=False)


class TrainedInFloat32Mixin:
    """For trainers on `Trainer`: refuses trainable weights in half precision, and models without trainable weights."""

    def create_optimizer(self, *args, **kwargs):
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("All weights are frozen, so nothing would be trained; set requires_grad of some.")
        check_trained_weights(self.model, self.args)
        return super().create_optimizer(*args, **kwargs)


def prepare_sharding(trainer):
    """What a trainer whose model FSDP2 shards needs beside accelerate: the tokenizer on its device, since FSDP moves
    only what it shards; and under mixed precision gradients added up, and losses left, in float32.

    Raises:
        ValueError: for FSDP of version 1, and where accelerate would load the weights on the first process only, and
            spread the sharded ones.
    """
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP of version 1 shards the vision tokenizer too, and gathers no head that the loss reads in parts; set "
            "fsdp_version to 2."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading spreads sharded weights only, and the vision tokenizer is not sharded; set "
            "it to false."
        )
    if plugin.mixed_precision_policy is not None:
        policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None)
        plugin.mixed_precision_policy = policy
    trainer.model.vq_model.to(trainer.args.device)
