"""Settings of a training that depend on the device: attention, compiled layers, kernels, gradient checkpointing."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from itertools import accumulate
from types import MethodType

import torch
from torch import nn
from transformers import TrainerCallback

from ..modeling_nextflow import NextFlowTextModel
from ..scale_schedule import ScaleSchedule
from ..sequence.scale_sdpa import CALL_COST, SCALE_SDPA


# The time of a pair of query and key in flex attention, relative to a kernel without a mask; an estimate.
FLEX_COST = 1.25


def backbone_of(model: nn.Module) -> NextFlowTextModel:
    """The backbone of a model, also of one inside of an adapter's wrapper."""
    return next(module for module in model.modules() if isinstance(module, NextFlowTextModel))


def choose_attention(model: nn.Module, device: torch.device, schedules: Iterable[ScaleSchedule]):
    """Set the attention for packs of samples whose images have these schedules, unless the user chose one.

    On a GPU flex attention reads a pack of small images in one call, while a call for each scale would take longer to
    start than to run.
    """
    config = backbone_of(model).config
    if config._attn_implementation != SCALE_SDPA or device.type != "cuda":
        return
    largest = max(schedules, key=lambda schedule: schedule.num_tokens, default=None)
    if largest is not None and not calls_are_faster(largest, config.hidden_size):
        model.set_attn_implementation({"": "flex_attention", "text_config": "flex_attention"})


def calls_are_faster(schedule: ScaleSchedule, hidden_size: int) -> bool:
    """Whether one call for each scale takes less time on a GPU than flex attention over the image."""
    counts = schedule.tokens_per_scale
    pairs = sum(count * end for count, end in zip(counts, accumulate(counts)))
    return pairs + len(counts) * CALL_COST["cuda"] / hidden_size < FLEX_COST * pairs


def compile_layers(model: nn.Module):
    """Compile each layer of the backbone separately; plans of attention are left out of the graphs."""
    for layer in backbone_of(model).layers:
        layer.compile(dynamic=True)


def use_liger(model: nn.Module) -> bool:
    """Use Liger's kernels for norms and gated products of the backbone; returns `False` if Liger is not installed.

    Compiled layers do not need them, since the compiler fuses the same operations and more.
    """
    try:
        kernels = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return False

    def norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return kernels.liger_rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def gated(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(kernels.liger_swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))

    backbone = backbone_of(model)
    for layer in backbone.layers:
        layer.mlp.forward = MethodType(gated, layer.mlp)
        for module in (layer.input_layernorm, layer.post_attention_layernorm):
            module.forward = MethodType(norm, module)
    backbone.norm.forward = MethodType(norm, backbone.norm)
    return True


class CheckpointedLayers(TrainerCallback):
    """Gradient checkpointing in only every `every`-th layer of the backbone, from the first one on.

    `Trainer` switches it on for all layers before training begins.
    """

    def __init__(self, every: int):
        self.every = every

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for index, layer in enumerate(backbone_of(model).layers):
            layer.gradient_checkpointing = index % self.every == 0
