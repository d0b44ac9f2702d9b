"""Diffusion between noise and images: the training loss, and the steps of decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .bases import TIMESTEPS, PromptEmbeddings
from .modeling_diffusion_decoder import NextFlowDiffusionDecoder
from .schedulers import make_scheduler, set_steps


# An error of the image has the weight 1 / time² (then it is an error of the velocity), but at times below this one the
# weight does not grow any more: there the noisy image determines most, and the decoder is to learn from the codes.
MIN_TIME = 0.5


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
    call, scheduler = decoder if call is None else call, make_scheduler(decoder.config.scheduler)
    noise, uniform = torch.randn_like(clean), torch.rand(len(clean), device=clean.device)
    if not decoder.is_flow_matching:
        steps = (uniform * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(clean, noise, steps)
        is_noise = decoder.config.predicts == "noise"
        target = noise if is_noise else scheduler.get_velocity(clean, noise, steps)
        return F.mse_loss(call(noisy, steps / TIMESTEPS, condition, prompt).float(), target)
    # Times in (0, 1], shifted if the scheduler has a shift.
    shift = scheduler.shift
    time = 1 - uniform
    time = shift * time / (1 + (shift - 1) * time)
    at = time.view(-1, 1, 1, 1)
    predicted = call((1 - at) * clean + at * noise, time, condition, prompt).float()
    if decoder.config.predicts == "velocity":
        return F.mse_loss(predicted, noise - clean)
    return ((predicted - clean) / at.clamp_min(MIN_TIME)).square().mean()


@torch.no_grad()
def denoise(
    decoder: NextFlowDiffusionDecoder,
    noise: torch.Tensor,
    condition: torch.Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    prompt: PromptEmbeddings | None = None,
) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] from noise (B, C, H', W') and the condition (B, D, h, w).

    Raises:
        ValueError: where they come out as NaN or infinity.
    """
    scheduler, sample = make_scheduler(decoder.config.scheduler), noise.float()
    set_steps(scheduler, num_inference_steps, sample.shape[-2] * sample.shape[-1], sample.device)
    for step in scheduler.timesteps:
        time = (step / TIMESTEPS).expand(len(sample))
        predicted = decoder(sample, time, condition, prompt).float()
        if guidance_scale != 1:
            unconditional = decoder(sample, time, None, prompt).float()
            predicted = unconditional + guidance_scale * (predicted - unconditional)
        if decoder.config.predicts == "image":
            predicted = (sample - predicted) / time[0]
        sample = scheduler.step(predicted, step, sample).prev_sample
    pixels = decoder.decode_pixels(sample)
    if not bool(pixels.isfinite().all()):
        raise ValueError(
            f"The diffusion decoder gives NaN or infinity with guidance_scale={guidance_scale} as {decoder.dtype}: its "
            "weights are damaged or the type is too small for it; use float32, less guidance, or decoder='pixel'."
        )
    return pixels
