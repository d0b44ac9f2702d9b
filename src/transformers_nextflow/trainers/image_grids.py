"""Sheets of images that are drawn with the same prompts and seeds during a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import TrainerCallback

from ..evaluation.image_metrics import contact_sheet
from ..generation.sampling import ImageSampling
from ..processing_nextflow import NextFlowProcessor
from ..utils.atomic_files import atomic_write
from .rl.rollouts import generate_rollouts
from .runs.trained_weights import gathered_weights, is_sharded


class ImageGrids(TrainerCallback):
    """Draws a sheet before training and every `every` steps, with a row for each prompt: `step_00000.png`, ….

    For any trainer of a [`NextFlowForConditionalGeneration`], or of a PEFT model around one. The first process writes.
    Weights that FSDP2 shards are gathered meanwhile, so a device must hold the whole model once. The random state of
    the training is left alone, so that it is the same with and without the sheets.

    Args:
        processor: the processor of the checkpoint.
        rows: rows with `prompt`, and the other entries that `generate_rollouts` takes.
        folder: default: `image_grids` in the training's output folder.
        every: number of steps between two sheets.
        num_images: number of images of each prompt, with the seeds 0, 1, ….
        sampling: default: the checkpoint's own.

    Raises:
        ValueError: for no rows, or an `every` below 1; when it draws, for weights that ZeRO 3 shards, of which
            no process has a whole model.
    """

    def __init__(
        self,
        processor: NextFlowProcessor,
        rows: Sequence[dict],
        folder: Path | str | None = None,
        every: int = 50,
        num_images: int = 4,
        sampling: ImageSampling | None = None,
    ):
        if every < 1 or not rows:
            raise ValueError(f"Give rows and every ≥ 1, got {len(rows)} rows and every={every}.")
        self.processor, self.rows, self.folder = processor, list(rows), folder
        self.every, self.num_images, self.sampling = every, num_images, sampling

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._save(args, state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self._save(args, state, model)

    def _save(self, args, state, model: nn.Module):
        if any(hasattr(weight, "ds_id") for weight in model.parameters()):
            raise ValueError(
                "ZeRO 3 shards the weights, so no process has a whole model to draw with; leave out ImageGrids."
            )
        if not (state.is_world_process_zero or is_sharded(model)):
            return
        # Of weights in parts all processes draw the same: FSDP2 reads from the passes so far what it gathers next.
        with gathered_weights(model):
            images = self._draw(model)
        if not state.is_world_process_zero:
            return
        folder = Path(self.folder or Path(args.output_dir) / "image_grids")
        starts = range(0, len(images), self.num_images)
        sheet = contact_sheet([images[start : start + self.num_images] for start in starts])
        with atomic_write(folder / f"step_{state.global_step:05d}.png") as partial:
            sheet.save(partial)

    def _draw(self, model: nn.Module) -> list[Image.Image]:
        base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        was_training = model.training
        model.eval()
        _, images = generate_rollouts(
            base_model,
            self.processor,
            [row for row in self.rows for _ in range(self.num_images)],
            self.sampling or base_model.default_image_sampling,
            generator=[torch.Generator().manual_seed(s) for _ in self.rows for s in range(self.num_images)],
        )
        model.train(was_training)
        return images
