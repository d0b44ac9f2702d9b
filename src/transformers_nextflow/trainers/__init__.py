"""Trainers of the tokenizer and of the transformer, on transformers' `Trainer`."""

from .adversarial import PatchDiscriminator
from .collator import NextFlowCollator
from .nextflow_trainer import NextFlowTrainer, NextFlowTrainingArguments
from .optimizers import MuonWithAdamW
from .packing import CostModel, PackedDataset, PackedStream
from .picture_grid import PictureGridCallback
from .vq_trainer import NextFlowVQTrainer, NextFlowVQTrainingArguments


__all__ = [
    "CostModel",
    "MuonWithAdamW",
    "NextFlowCollator",
    "NextFlowTrainer",
    "NextFlowTrainingArguments",
    "NextFlowVQTrainer",
    "NextFlowVQTrainingArguments",
    "PackedDataset",
    "PackedStream",
    "PatchDiscriminator",
    "PictureGridCallback",
]
