"""The diffusion decoder that a recipe trains, and its images."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...data.sources import open_rows
from ...data.vision_tokenizer import load_vision_tokenizer
from ...diffusion_decoder import (
    DiffusionSettings,
    NextFlowDiffusionDecoder,
    decode_codes,
    decoder_on_base,
    small_decoder,
)  # fmt: skip
from ...evaluation.image_metrics import to_uint8
from ...image_processing_nextflow import NextFlowImageProcessor
from ...modeling_nextflow_vq import NextFlowVQModel
from ...utils.evaluation_mode import evaluation_mode
from ...utils.known_names import check_names
from ..recipe_data import StageImages
from .arguments import NextFlowDiffusionTrainingArguments
from .diffusion_trainer import NextFlowDiffusionTrainer


class DecoderImages(StageImages):
    """The images of rows, cropped to squares, `upsampling` times as large as the tokenizer's level.

    An item has `pixel_values` (3, side, side) in [-1, 1].
    """

    def __init__(self, rows, root: Path, processor: NextFlowImageProcessor, level: int, upsampling: int):
        super().__init__(rows, root, processor, level)
        self.upsampling = upsampling

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = np.asarray(self.square(index, self.level * self.upsampling))
        return {"pixel_values": torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1}


def make_decoder(vq_model: NextFlowVQModel, settings: dict[str, Any], level: int) -> NextFlowDiffusionDecoder:
    """A decoder to train.

    Args:
        settings: `start` is the folder of a decoder to start from (for the second stage, with `upsampling: 2`), `base`
            a pipeline of diffusers; without them the decoder is a small UNet. Others are arguments for these.

    Raises:
        ValueError: for unknown settings, or the decoder of another tokenizer.
    """
    settings = dict(settings)
    start, base = settings.pop("start", None), settings.pop("base", None)
    if start is not None:
        check_names(settings, ["start", "upsampling"], "decoder of a recipe with start")
        decoder = NextFlowDiffusionDecoder.from_pretrained(start).float()
        if settings.get("upsampling", decoder.config.upsampling) != decoder.config.upsampling:
            decoder = decoder.upsampled()
    else:
        known = {*inspect.signature(NextFlowDiffusionDecoder).parameters, "start"}
        known |= set() if base is not None else set(inspect.signature(small_decoder).parameters) - {"settings"}
        check_names(settings, sorted(known - {"base_model", "vae_model", "vq_model"}), "decoder of a recipe")
        settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
        decoder = small_decoder(vq_model, **settings) if base is None else decoder_on_base(vq_model, base, **settings)
    decoder.register_to_config(trained_sizes=[[level, level]])
    side = level // decoder.config.patch_size
    decoder.sample_shape((side, side))  # raises for a size that its base does not divide
    return decoder


@torch.no_grad()
def decoder_comparison(trainer: NextFlowDiffusionTrainer, images: Sequence[torch.Tensor]) -> list[list[Image.Image]]:
    """Three rows of images: some (3, H, W) in [-1, 1] of the decoder's size; what the pixel decoder makes of their
    codes; and what the diffusion decoder does.
    """
    decoder, vq_model = trainer.accelerator.unwrap_model(trainer.model), trainer.vq_model
    originals = torch.stack([*images]).to(vq_model.device)
    small = F.avg_pool2d(originals, decoder.config.upsampling)
    codes, schedule = vq_model.encode(small).image_tokens, vq_model.schedule_of(small)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(images))]
    settings = DiffusionSettings.of(decoder, None, None)
    with evaluation_mode(decoder):
        diffused = decode_codes(decoder, vq_model, codes, [schedule] * len(images), settings, generators)
    rows = (originals, vq_model.reconstruct(small), diffused)
    return [[Image.fromarray(to_uint8(pixels)) for pixels in row] for row in rows]


def decoder_trainer(recipe, folder: str | os.PathLike, data: str | os.PathLike, output: str | os.PathLike):
    """The trainer of a recipe of kind "diffusion_decoder"; `folder` holds the tokenizer, or a model with one."""
    args = NextFlowDiffusionTrainingArguments(output_dir=str(output), **recipe.arguments)
    vq_model = load_vision_tokenizer(folder)
    config = vq_model.config
    level = recipe.level or config.scale_schedules.resolutions[-1]
    torch.manual_seed(args.seed)
    decoder = make_decoder(vq_model, recipe.decoder, level)
    source, root = open_rows(data, recipe.columns, needs_texts=False)
    processor = NextFlowImageProcessor(config.scales, config.patch_size, config.levels)
    images = DecoderImages(source, root, processor, level, decoder.config.upsampling)
    return NextFlowDiffusionTrainer(decoder, args, images, vq_model=vq_model)
