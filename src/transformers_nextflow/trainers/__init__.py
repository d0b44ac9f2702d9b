"""Trainers of the tokenizer, the transformer and the diffusion decoder on `Trainer`, and RL on TRL's."""

from importlib.util import find_spec
from typing import TYPE_CHECKING


try:
    import accelerate  # noqa: F401  (so that all trainers name the same extra)
except ImportError as error:
    raise ImportError("Training needs accelerate: pip install transformers-nextflow[train]") from error

from .collator import NextFlowCollator
from .diffusion.arguments import NextFlowDiffusionTrainingArguments
from .image_grids import ImageGrids
from .nextflow_trainer import NextFlowTrainer, NextFlowTrainingArguments
from .optimizers import MuonWithAdamW
from .packing import CostModel, PackedDataset, PackedStream
from .tokenizer.adversarial import PatchDiscriminator
from .tokenizer.perceptual import load_perceptual
from .tokenizer.vq_trainer import NextFlowVQTrainer, NextFlowVQTrainingArguments


if TYPE_CHECKING:
    from .diffusion.diffusion_trainer import NextFlowDiffusionTrainer
    from .rl.grpo_config import NextFlowGRPOConfig
    from .rl.grpo_trainer import NextFlowGRPOTrainer

__all__ = [
    "CostModel",
    "MuonWithAdamW",
    "NextFlowCollator",
    "NextFlowDiffusionTrainingArguments",
    "NextFlowTrainer",
    "NextFlowTrainingArguments",
    "NextFlowVQTrainer",
    "NextFlowVQTrainingArguments",
    "PackedDataset",
    "PackedStream",
    "PatchDiscriminator",
    "ImageGrids",
    "load_perceptual",
]
# RL needs trl and the diffusion decoder diffusers, both extras.
if find_spec("diffusers"):
    __all__ += ["NextFlowDiffusionTrainer"]
if find_spec("trl"):
    __all__ += ["NextFlowGRPOConfig", "NextFlowGRPOTrainer"]


def __getattr__(name: str):
    # Imported on access; without the extra the error names it.
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


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
