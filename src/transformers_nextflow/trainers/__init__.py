"""Trainers of the tokenizer, the transformer and the diffusion decoder on `Trainer`, and RL on TRL's."""

from .collator import NextFlowCollator
from .diffusion.arguments import NextFlowDiffusionTrainingArguments
from .image_grids import ImageGrids
from .nextflow_trainer import NextFlowTrainer, NextFlowTrainingArguments
from .optimizers import MuonWithAdamW
from .packing import CostModel, PackedDataset, PackedStream
from .tokenizer.adversarial import PatchDiscriminator
from .tokenizer.vq_trainer import NextFlowVQTrainer, NextFlowVQTrainingArguments


__all__ = [
    "CostModel",
    "MuonWithAdamW",
    "NextFlowCollator",
    "NextFlowDiffusionTrainer",
    "NextFlowDiffusionTrainingArguments",
    "NextFlowGRPOConfig",
    "NextFlowGRPOTrainer",
    "NextFlowTrainer",
    "NextFlowTrainingArguments",
    "NextFlowVQTrainer",
    "NextFlowVQTrainingArguments",
    "PackedDataset",
    "PackedStream",
    "PatchDiscriminator",
    "ImageGrids",
]


def __getattr__(name: str):
    # RL needs trl and the diffusion decoder diffusers, both extras: they are imported when they are asked for.
    if name == "NextFlowDiffusionTrainer":
        from .diffusion.diffusion_trainer import NextFlowDiffusionTrainer

        return NextFlowDiffusionTrainer
    if name == "NextFlowGRPOConfig":
        from .rl.grpo_config import NextFlowGRPOConfig

        return NextFlowGRPOConfig
    if name == "NextFlowGRPOTrainer":
        from .rl.grpo_trainer import NextFlowGRPOTrainer

        return NextFlowGRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
