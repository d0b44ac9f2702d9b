"""Decodes codes to pixels with a diffusion decoder, for batches of images of any sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..modeling_nextflow_vq import NextFlowVQModel
from ..scale_schedule import ScaleSchedule
from .bases import PromptEmbeddings
from .condition import code_condition
from .denoising import denoise
from .modeling_diffusion_decoder import NextFlowDiffusionDecoder
from .settings import DiffusionSettings


# The largest number of pixels that are denoised in one batch: four images of 1024 x 1024.
MAX_PIXELS = 2**22


@torch.no_grad()
def decode_codes(
    decoder: NextFlowDiffusionDecoder,
    vq_model: NextFlowVQModel,
    image_tokens: torch.Tensor,
    schedules: Sequence[ScaleSchedule],
    settings: DiffusionSettings,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    prompts: list[str] | None = None,
) -> list[torch.Tensor]:
    """Images, a list of (3, H, W) in [-1, 1], `upsampling` times as large as the tokenizer's.

    Args:
        image_tokens: (B, n) codes of all scales of each image, or of its first ones, padded with -1.
        schedules: the schedule of each image.
        generator: source of the noise: one for all images, or one for each; then an image does not depend on the
            others.
        prompts: the prompt of each image, for a decoder with a `text_encoder`.

    Raises:
        ValueError: for a size that the decoder does not draw, and where an image comes out as NaN or infinity.
    """
    shapes = [decoder.sample_shape(schedule.final_grid) for schedule in schedules]
    device = vq_model.device
    noise = [own.to(device) for own in _draw_noise(shapes, generator)]
    counts = (image_tokens >= 0).sum(1).tolist()
    kinds = list(zip(schedules, counts))
    batches = []
    for schedule, count in dict.fromkeys(kinds):
        same = [index for index, kind in enumerate(kinds) if kind == (schedule, count)]
        height, width = schedule.image_size(decoder.config.patch_size * decoder.config.upsampling)
        at_once = max(1, MAX_PIXELS // (height * width))
        for chosen in (same[start : start + at_once] for start in range(0, len(same), at_once)):
            batches.append((chosen, code_condition(vq_model, image_tokens[chosen, :count], schedule)))
    images: list[torch.Tensor | None] = [None] * len(kinds)
    # The conditions of all images come first: with offloading, the decoder replaces the tokenizer on the device.
    for chosen, condition in batches:
        pixels = denoise(
            decoder, torch.stack([noise[index] for index in chosen]), condition, settings.num_inference_steps,
            settings.guidance_scale, _prompt(decoder, prompts, chosen),
        )  # fmt: skip
        for index, image in zip(chosen, pixels):
            images[index] = image
    return images


def _draw_noise(shapes, generator) -> list[torch.Tensor]:
    """Noise (C, H, W) for each image: from its own generator, or for one image after the other from a common one."""
    generators = generator if isinstance(generator, list | tuple) else [generator] * len(shapes)
    return [
        torch.randn(shape, generator=own, device="cpu" if own is None else own.device)
        for shape, own in zip(shapes, generators)
    ]


def _prompt(decoder, prompts: list[str] | None, chosen: list[int]) -> PromptEmbeddings | None:
    if prompts is None or decoder.text_encoder is None:
        return None
    return decoder.text_encoder([prompts[index] for index in chosen])
