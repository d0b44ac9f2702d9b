"""Diffusion between noise and images: the training loss, and the steps of decoding."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler

from .bases import TIMESTEPS, PromptEmbeddings
from .modeling_diffusion_decoder import NextFlowDiffusionDecoder


# An error of the image has the weight 1 / time² (then it is an error of the velocity), but at times below this one the
# weight does not grow any more: there the noisy image determines most, and the decoder is to learn from the codes.
LEAST_TIME = 0.5


def make_scheduler(decoder: NextFlowDiffusionDecoder):
    """A new scheduler with the decoder's config, whose state is not shared."""
    config = decoder.config.scheduler
    if config is None:
        return FlowMatchEulerDiscreteScheduler()
    # A few steps must start at the last time, at which there is only noise; many schedulers leave it out by default.
    spacing = {"timestep_spacing": "trailing"} if "timestep_spacing" in config else {}
    return getattr(diffusers, config["_class_name"]).from_config(dict(config), **spacing)


def diffusion_loss(
    decoder: NextFlowDiffusionDecoder,
    clean: torch.Tensor,
    condition: torch.Tensor,
    prompt: PromptEmbeddings | None = None,
    call: Callable | None = None,
) -> torch.Tensor:
    """The loss of a batch, with times and noise from torch's global generator.

    Args:
        clean: (B, C, H, W), see `encode_pixels`.
        condition: (B, D, h, w); rows of zeros are trained without a condition.
        call: the decoder, possibly wrapped by a trainer.
    """
    call, scheduler = call or decoder, make_scheduler(decoder)
    noise, drawn = torch.randn_like(clean), torch.rand(len(clean), device=clean.device)
    if not decoder.is_flow_matching:
        steps = (drawn * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(clean, noise, steps)
        return F.mse_loss(call(noisy, steps / TIMESTEPS, condition, prompt).float(), noise)
    # Times in (0, 1], shifted if the scheduler has a shift.
    shift = scheduler.shift
    time = 1 - drawn
    time = shift * time / (1 + (shift - 1) * time)
    at = time.view(-1, 1, 1, 1)
    predicted = call((1 - at) * clean + at * noise, time, condition, prompt).float()
    if decoder.config.predicts == "velocity":
        return F.mse_loss(predicted, noise - clean)
    return ((predicted - clean) / at.clamp_min(LEAST_TIME)).square().mean()


@torch.no_grad()
def denoise(
    decoder: NextFlowDiffusionDecoder,
    noise: torch.Tensor,
    condition: torch.Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    prompt: PromptEmbeddings | None = None,
) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] from noise (B, C, H', W') and the condition (B, D, h, w)."""
    scheduler, sample = make_scheduler(decoder), noise.float()
    if decoder.is_flow_matching:
        options = {"sigmas": torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()}
        if scheduler.config.use_dynamic_shifting:
            options["mu"] = _shift_of_size(scheduler.config, sample.shape[-2] * sample.shape[-1] // 4)
        scheduler.set_timesteps(device=sample.device, **options)
    else:
        scheduler.set_timesteps(num_inference_steps, device=sample.device)
        sample = sample * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        time = (step / TIMESTEPS).expand(len(sample))
        inputs = sample if decoder.is_flow_matching else scheduler.scale_model_input(sample, step)
        predicted = decoder(inputs, time, condition, prompt).float()
        if guidance_scale != 1:
            unconditional = decoder(inputs, time, None, prompt).float()
            predicted = unconditional + guidance_scale * (predicted - unconditional)
        if decoder.config.predicts == "image":
            predicted = (sample - predicted) / time[0]
        sample = scheduler.step(predicted, step, sample).prev_sample
    return decoder.decode_pixels(sample)


def _shift_of_size(config, tokens: int) -> float:
    """The shift of schedulers with a dynamic shift for an image of `tokens` tokens: linear between two given sizes."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)
