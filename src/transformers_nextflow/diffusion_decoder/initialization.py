"""Diffusion decoders from which a training starts: a small one of our own, or one on a trained base of diffusers."""

from __future__ import annotations

import inspect
import os
from typing import Any

import diffusers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel

from ..modeling_nextflow_vq import NextFlowVQModel
from ..utils.atomic_files import check_path
from ..utils.checkpoint_checks import check_weights, loading_errors
from ..utils.known_names import check_names
from ..utils.short_repr import short_repr
from ..utils.typed_values import check_types
from .bases import find_base
from .condition import condition_channels, condition_fingerprint
from .config_checks import MAX_CHANNELS, MAX_LAYERS
from .modeling_diffusion_decoder import NextFlowDiffusionDecoder
from .schedulers import make_scheduler, predictions, scheduler_class


# Names of the denoiser in pipelines of diffusers.
DENOISERS = ("transformer", "unet")
NORM_GROUPS = 8


def tokenizer_arguments(vq_model: NextFlowVQModel) -> dict[str, Any]:
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

    Raises:
        ValueError: for channels that are no multiples of 8, and what `NextFlowDiffusionDecoder` refuses.
    """
    given = {"channels": channels, "layers": layers, "pixel_cell": pixel_cell}
    check_types(given, {"channels": tuple[int, ...], "layers": int, "pixel_cell": int}, "small_decoder")
    known = set(inspect.signature(NextFlowDiffusionDecoder).parameters) - {"base", "base_model", "vae", "vae_model"}
    check_names(settings, sorted(known), "small_decoder")
    if not channels or min(channels) < 1 or any(width % NORM_GROUPS for width in channels):
        raise ValueError(f"channels are multiples of {NORM_GROUPS}, one for each level, got {short_repr(channels)}.")
    if not (1 <= pixel_cell <= MAX_CHANNELS and 1 <= layers <= MAX_LAYERS):
        raise ValueError(
            f"pixel_cell and layers must be at least 1, got {short_repr(pixel_cell)} and {short_repr(layers)}."
        )
    own = 3 * pixel_cell**2
    base = UNet2DModel(
        in_channels=own,
        out_channels=own,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=NORM_GROUPS,
        add_attention=False,
    )
    settings = {"predicts": "image"} | tokenizer_arguments(vq_model) | settings
    return NextFlowDiffusionDecoder(base=config_of(base), pixel_cell=pixel_cell, **settings)


def decoder_on_base(vq_model: NextFlowVQModel, base: str | os.PathLike, **settings: Any) -> NextFlowDiffusionDecoder:
    """A decoder on the denoiser of a text-to-image pipeline, with its weights, VAE and scheduler.

    Args:
        base: a folder or repository of diffusers with a `scheduler`, a `transformer` or a `unet`, and a `vae` if it has
            latents.
        settings: other arguments of [`NextFlowDiffusionDecoder`], such as `lora_rank`.

    Raises:
        ValueError: for a pipeline without a denoiser whose visual branch is known, and for weights that are not finite.
    """
    check_path(base)
    with loading_errors(base):
        parts = DiffusionPipeline.load_config(base)
        classes = {name: part[1] for name, part in parts.items() if isinstance(part, list) and len(part) == 2}
        name = next((name for name in DENOISERS if classes.get(name)), None)
        if name is None or not classes.get("scheduler"):
            raise ValueError(
                f"{base} has no denoiser, or no scheduler; its model_index.json names one of {', '.join(DENOISERS)}, "
                "and a scheduler, each with its class."
            )
        find_base({"_class_name": classes[name]})  # raises before weights are loaded
        denoiser = getattr(diffusers, classes[name]).from_pretrained(base, subfolder=name)
        vae = AutoencoderKL.from_pretrained(base, subfolder="vae") if classes.get("vae") else None
        scheduler = scheduler_class(classes["scheduler"]).from_pretrained(base, subfolder="scheduler")
        for part in (denoiser, vae):
            if part is not None:
                check_weights(part)
        # Only what is used of it: configs of others may hold infinite values (DPM-Solver's), which JSON does not have.
        noise = config_of(make_scheduler(config_of(scheduler)))
        settings = {"predicts": predictions(noise)[0]} | tokenizer_arguments(vq_model) | settings
    decoder = NextFlowDiffusionDecoder(
        base=config_of(denoiser), vae=None if vae is None else config_of(vae), scheduler=noise,
        base_model=denoiser, vae_model=vae, **settings,
    )  # fmt: skip
    decoder.register_to_config(_name_or_path=str(base))  # whose licence its card tells on
    return decoder


def config_of(part) -> dict[str, Any]:
    """The config from which a part of diffusers can be made again, with its class."""
    kept = {name: value for name, value in part.config.items() if not name.startswith("_")}
    return {"_class_name": type(part).__name__} | kept
