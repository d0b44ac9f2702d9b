"""Pictures of the same prompts and seeds during a training, on sheets side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import TrainerCallback

from ..evaluation.image_metrics import contact_sheet, to_uint8
from ..processing_nextflow import NextFlowProcessor
from ..sampling_nextflow import ImageSampling


class PictureGridCallback(TrainerCallback):
    """Draws fixed prompts every `every` steps and writes `pictures/step_N.png`, a row for each prompt.

    The random state of the training is left alone, so the training is the same with and without it. The first process
    draws. Not for sharded weights (FSDP, ZeRO 3), of which no process has a whole model.

    Args:
        processor: of the model.
        prompts: one row each.
        every: steps between two sheets, from 1.
        image_size: (height, width) in pixels.
        num_images: pictures for each prompt, each with a seed of its own, counted from `seed`.
        sampling: settings of the scale loop; default the model's own.

    Raises:
        ValueError: for no prompts, or an `every` below 1; when it draws, for sharded weights.
    """

    def __init__(
        self,
        processor: NextFlowProcessor,
        prompts: Sequence[str],
        every: int,
        image_size: tuple[int, int],
        num_images: int = 4,
        seed: int = 0,
        sampling: ImageSampling | None = None,
    ):
        if every < 1 or not prompts:
            raise ValueError(f"Give prompts and every ≥ 1, got {len(prompts)} prompts and every={every}.")
        self.processor, self.prompts, self.every = processor, list(prompts), every
        self.image_size, self.num_images, self.seed, self.sampling = image_size, num_images, seed, sampling

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        if any(hasattr(weight, "placements") or hasattr(weight, "ds_id") for weight in model.parameters()):
            raise ValueError("Weights are sharded (FSDP, ZeRO 3): no process can draw. Leave PictureGridCallback out.")
        path = Path(args.output_dir) / "pictures" / f"step_{state.global_step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(self.draw(model)).save(path)

    @torch.no_grad()
    def draw(self, model) -> list[list[Image.Image]]:
        """A row of pictures for each prompt."""
        was_training = model.training
        model.eval()
        try:
            return [self._draw(model, prompt) for prompt in self.prompts]
        finally:
            model.train(was_training)

    def _draw(self, model, prompt: str) -> list[Image.Image]:
        count = self.num_images
        inputs = self.processor.apply_image_prompt([prompt] * count).to(model.device)
        empty = self.processor.apply_image_prompt([""] * count, allow_empty=True).to(model.device)
        drawn = model.generate_images(
            **inputs,
            negative_input_ids=empty.input_ids,
            negative_attention_mask=empty.attention_mask,
            image_sizes=[self.image_size] * count,
            sampling=self.sampling,
            generator=[torch.Generator().manual_seed(self.seed + number) for number in range(count)],
        )
        pixels = model.decode_image_tokens(drawn.image_tokens, drawn.image_grids)
        return [Image.fromarray(picture) for picture in to_uint8(torch.stack(pixels))]
