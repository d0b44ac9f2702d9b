"""Training of the transformer on `Trainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import Trainer, TrainingArguments

from ..modeling_nextflow import NextFlowForConditionalGeneration
from .optimizers import MuonWithAdamW


@dataclass
class NextFlowTrainingArguments(TrainingArguments):
    """`TrainingArguments` and what NextFlow adds.

    Args:
        muon: step the hidden matrices with Muon and the rest with AdamW, in place of `optim`.
        compile_layers: compile each layer of the backbone by itself.
    """

    muon: bool = field(default=False)
    compile_layers: bool = field(default=False)

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False
        self.label_names = self.label_names or ["labels"]


class NextFlowTrainer(Trainer):
    """Trains a [`NextFlowForConditionalGeneration`] on the batches of a [`NextFlowCollator`].

    Logs the text loss, the weighted image loss, and each scale's own loss beside the total. `compute_metrics`-like
    scoring of drawn pictures is the business of callbacks.
    """

    args: NextFlowTrainingArguments

    def __init__(self, model: NextFlowForConditionalGeneration, args: NextFlowTrainingArguments, **kwargs):
        if args.compile_layers:
            for layer in model.model.language_model.layers:
                layer.compile(dynamic=True)
        super().__init__(model=model, args=args, **kwargs)
        self._parts: dict[str, list[torch.Tensor]] = {}

    def create_optimizer(self, *args, **kwargs):
        if self.args.muon and self.optimizer is None:
            model = self.accelerator.unwrap_model(self.model)
            self.optimizer = MuonWithAdamW(
                model,
                self.args.learning_rate,
                self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                orthogonalize_dtype=torch.bfloat16 if self.args.bf16 else torch.float32,
            )
        return super().create_optimizer(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples, device):
        # Trained positions are text tokens and codes; `labels` alone do not count the latter.
        return None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if self.model.training:
            parts = {"text_loss": outputs.text_loss, "image_loss": outputs.image_loss}
            parts |= {f"scale_{scale}_loss": loss for scale, loss in enumerate(outputs.scale_losses, start=1)}
            for name, value in parts.items():
                self._parts.setdefault(name, []).append(value)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            for name, values in self._parts.items():
                logs[name] = round(float(torch.stack(values).nanmean()), 4)
            self._parts.clear()
        super().log(logs, start_time)
