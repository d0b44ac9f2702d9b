"""Training of the diffusion decoder on `Trainer`, with only the diffusion loss (paper, section 2.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import Trainer

from ...diffusion_decoder import NextFlowDiffusionDecoder, PromptEmbeddings, code_condition, condition_fingerprint
from ...diffusion_decoder.denoising import diffusion_loss
from ...modeling_nextflow_vq import NextFlowVQModel
from ..runs.averaged_weights import AveragedWeightsMixin
from ..runs.finite_training import FiniteTrainingMixin
from ..runs.resumable_training import ResumableTrainingMixin
from ..runs.trained_weights import TrainedInFloat32Mixin
from ..runs.training_card import TrainingCardMixin
from ..tokenizer.vq_trainer import ImageCollator
from .arguments import NextFlowDiffusionTrainingArguments


class NextFlowDiffusionTrainer(
    TrainingCardMixin, TrainedInFloat32Mixin, ResumableTrainingMixin, AveragedWeightsMixin, FiniteTrainingMixin, Trainer
):
    """Trains a [`NextFlowDiffusionDecoder`].

    Rows hold `pixel_values` (3, H, W) in [-1, 1] of the decoder's size; optionally the codes `image_tokens` (N,),
    without which the tokenizer encodes the image at its own size; and optionally, for a base with a text branch,
    `prompt_tokens` (L, D) and `prompt_pooled` (P,).

    Args:
        vq_model: the tokenizer, which is frozen.

    Raises:
        ValueError: for the decoder of another tokenizer.
    """

    args: NextFlowDiffusionTrainingArguments

    def __init__(
        self,
        model: NextFlowDiffusionDecoder,
        args: NextFlowDiffusionTrainingArguments,
        train_dataset: Dataset,
        vq_model: NextFlowVQModel,
        **kwargs,
    ):
        self._tokenizer = condition_fingerprint(vq_model)
        model.check_condition(self._tokenizer)
        kwargs.setdefault("data_collator", ImageCollator())
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.vq_model = vq_model.to(args.device).eval().requires_grad_(False)
        self.model_accepts_loss_kwargs = False

    @property
    def _core(self) -> NextFlowDiffusionDecoder:
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixels, decoder = inputs["pixel_values"], self._core
        condition = self._condition(pixels, inputs.get("image_tokens"))
        if model.training:
            kept = torch.rand(len(pixels), device=pixels.device) >= self.args.condition_dropout
            condition = condition * kept.view(-1, 1, 1, 1)
        prompt = None
        if "prompt_tokens" in inputs:
            prompt = PromptEmbeddings(inputs["prompt_tokens"], inputs.get("prompt_pooled"))
        loss = diffusion_loss(decoder, decoder.encode_pixels(pixels), condition, prompt, call=model)
        return (loss, None) if return_outputs else loss

    def _condition(self, pixels: torch.Tensor, image_tokens: torch.Tensor | None) -> torch.Tensor:
        own_size = F.avg_pool2d(pixels, self._core.config.upsampling)
        if image_tokens is None:
            with torch.no_grad():
                image_tokens = self.vq_model.encode(own_size).image_tokens
        return code_condition(self.vq_model, image_tokens, self.vq_model.schedule_of(own_size))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Write the decoder with its averaged weights. Checkpoints hold the weights of the step and the averages."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self.check_weights()
            with self.averaged_weights():
                self._core.save_pretrained(output_dir or self.args.output_dir)
            self.write_training_card(output_dir or self.args.output_dir)

    def record_extras(self) -> dict:
        return {"tokenizer": self._tokenizer}
