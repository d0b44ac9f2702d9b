"""Training of the diffusion decoder on `Trainer`, with the diffusion loss only (paper, section 2.4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from ...diffusion_decoder import NextFlowDiffusionDecoder, PromptEmbeddings, code_condition, condition_fingerprint
from ...diffusion_decoder.denoising import diffusion_loss
from ...modeling_nextflow_vq import NextFlowVQModel
from ..runs.finite_training import FiniteTrainingMixin
from ..runs.resumable_training import ResumableTrainingMixin
from ..runs.trained_weights import TrainedInFloat32Mixin
from ..tokenizer.vq_trainer import ImageCollator
from .arguments import NextFlowDiffusionTrainingArguments


EMA_FILE = "ema.pt"


class NextFlowDiffusionTrainer(TrainedInFloat32Mixin, ResumableTrainingMixin, FiniteTrainingMixin, Trainer):
    """Trains a [`NextFlowDiffusionDecoder`].

    Rows hold `pixel_values` (3, H, W) in [-1, 1] of the decoder's size; `image_tokens` (N,) where codes are ready-made,
    else the tokenizer encodes the image at its own size; and for a base with a text branch, where prompts are wanted,
    `prompt_tokens` (L, D) and `prompt_pooled` (P,).

    Args:
        vq_model: the tokenizer, which rests.

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
        from diffusers.training_utils import EMAModel  # here, so that without diffusers the room's error comes first

        self.ema = EMAModel(self._trained(), decay=args.ema_decay)
        self.add_callback(_AveragesWeights(self))

    @property
    def _core(self) -> NextFlowDiffusionDecoder:
        return self.accelerator.unwrap_model(self.model)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self._core.parameters() if parameter.requires_grad]

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

    # The running mean of the weights ----------------------------------------------------------------------------------

    @contextmanager
    def averaged_weights(self) -> Iterator[NextFlowDiffusionDecoder]:
        """The decoder, which has the mean of its weights for as long as this lasts."""
        self.ema.store(self._trained())
        self.ema.copy_to(self._trained())
        try:
            yield self._core
        finally:
            self.ema.restore(self._trained())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Write the decoder with its averaged weights. Checkpoints hold those of the step, and the mean beside them."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        self.check_weights()
        if self.args.should_save:
            with self.averaged_weights() as decoder:
                decoder.save_pretrained(output_dir or self.args.output_dir)

    def decisive_extras(self) -> dict:
        return {"tokenizer": self._tokenizer}

    def _save_optimizer_and_scheduler(self, output_dir: str):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.ema.state_dict(), Path(output_dir) / EMA_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        super()._load_optimizer_and_scheduler(checkpoint)
        # Where it is missing, going on was asked for with resume_with_changes.
        if checkpoint is not None and (file := Path(checkpoint) / EMA_FILE).is_file():
            self.ema.load_state_dict(torch.load(file, map_location=self.args.device, weights_only=True))


class _AveragesWeights(TrainerCallback):
    def __init__(self, trainer: NextFlowDiffusionTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.ema.step(self.trainer._trained())
