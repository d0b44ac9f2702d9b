"""Diffusion decoders from which a training starts: a small one of our own, or one on a trained base of diffusers."""

from __future__ import annotations

import os
from typing import Any

import diffusers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel

from ..modeling_nextflow_vq import NextFlowVQModel
from ..utils.checkpoint_checks import loading_errors
from .bases import base_of
from .condition import condition_channels, condition_fingerprint
from .modeling_diffusion_decoder import NextFlowDiffusionDecoder


# Names of the denoiser in pipelines of diffusers.
DENOISERS = ("transformer", "unet")


def of_tokenizer(vq_model: NextFlowVQModel) -> dict[str, Any]:
    """The arguments of a decoder that follow from its tokenizer."""
    return {
        "condition_channels": condition_channels(vq_model.config),
        "patch_size": vq_model.config.patch_size,
        "fingerprint": condition_fingerprint(vq_model),
    }


def small_decoder(
    vq_model: NextFlowVQModel,
    channels: tuple[int, ...] = (64, 96, 128),
    layers: int = 1,
    pixel_cell: int = 4,
    **settings: Any,
) -> NextFlowDiffusionDecoder:
    """A small UNet with random weights that predicts images.

    Args:
        channels: channels of its levels, the finest first; each level halves the sides.
        layers: number of residual blocks of a level.
        pixel_cell: side of the squares of pixels that are one cell of the UNet.
        settings: other arguments of [`NextFlowDiffusionDecoder`].
    """
    own = 3 * pixel_cell**2
    base = UNet2DModel(
        in_channels=own,
        out_channels=own,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=8,
        add_attention=False,
    )
    settings = {"predicts": "image"} | of_tokenizer(vq_model) | settings
    return NextFlowDiffusionDecoder(base=config_of(base), pixel_cell=pixel_cell, **settings)


def decoder_on_base(vq_model: NextFlowVQModel, base: str | os.PathLike, **settings: Any) -> NextFlowDiffusionDecoder:
    """A decoder on the denoiser of a text-to-image pipeline, with its weights, VAE and scheduler.

    Args:
        base: a folder or repository of diffusers with a `transformer` or a `unet`, and a `vae` if it has latents.
        settings: other arguments of [`NextFlowDiffusionDecoder`], such as `lora_rank`.

    Raises:
        ValueError: for a pipeline without a denoiser that is in `BASES`.
    """
    with loading_errors(base):
        parts = DiffusionPipeline.load_config(base)
        name = next((name for name in DENOISERS if name in parts), None)
        if name is None:
            raise ValueError(f"{base} has no denoiser; it needs one of {', '.join(DENOISERS)}.")
        base_of({"_class_name": parts[name][1]})  # raises before weights are loaded
        denoiser = getattr(diffusers, parts[name][1]).from_pretrained(base, subfolder=name)
        vae = AutoencoderKL.from_pretrained(base, subfolder="vae") if "vae" in parts else None
        scheduler = getattr(diffusers, parts["scheduler"][1]).from_pretrained(base, subfolder="scheduler")
    is_flow = type(scheduler).__name__.startswith("FlowMatch")
    settings = {"predicts": "velocity" if is_flow else "noise"} | of_tokenizer(vq_model) | settings
    return NextFlowDiffusionDecoder(
        base=config_of(denoiser), vae=None if vae is None else config_of(vae), scheduler=config_of(scheduler),
        base_model=denoiser, vae_model=vae, **settings,
    )  # fmt: skip


def config_of(part) -> dict[str, Any]:
    """The config from which a part of diffusers can be made again, with its class."""
    kept = {name: value for name, value in part.config.items() if not name.startswith("_")}
    return {"_class_name": type(part).__name__} | kept
