from .adversarial import PatchDiscriminator
from .collator import NextFlowCollator
from .nextflow_trainer import NextFlowTrainer, NextFlowTrainingArguments
from .optimizers import MuonWithAdamW
from .vq_trainer import NextFlowVQTrainer, NextFlowVQTrainingArguments
