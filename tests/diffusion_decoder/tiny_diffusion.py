"""Random diffusion decoders so small that a test builds its own in a moment, one for each kind of base."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from transformers_nextflow.diffusion_decoder import NextFlowDiffusionDecoder, small_decoder
from transformers_nextflow.diffusion_decoder.initialization import config_of, tokenizer_arguments


def tiny_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,),
        norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
    )  # fmt: skip


def tiny_flux():
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip


def tiny_sd3():
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6,
        pos_embed_max_size=32,
    )  # fmt: skip


def tiny_text_unet():
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2,
    )  # fmt: skip


DYNAMIC = {"use_dynamic_shifting": True}
# Kind → denoiser, scheduler, rank of adapters.
TRAINED_BASES = {
    "text unet": (tiny_text_unet, DDIMScheduler, None),
    "flux": (tiny_flux, lambda: FlowMatchEulerDiscreteScheduler(**DYNAMIC), 2),
    "sd3": (tiny_sd3, lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), 2),
}
KINDS = ("small", *TRAINED_BASES)


def tiny_decoder(vq_model, kind="small", seed=0, **settings) -> NextFlowDiffusionDecoder:
    """A random one in evaluation mode; of a trained kind, as on a base with its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "small":
            settings = {"pixel_cell": 2, "channels": (8, 16)} | settings
            return small_decoder(vq_model, **settings).eval()
        denoiser, scheduler, rank = TRAINED_BASES[kind]
        base, vae, scheduler = denoiser(), tiny_vae(), scheduler()
        is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        settings = {
            "lora_rank": rank, "predicts": "velocity" if is_flow else "noise", "scheduler": config_of(scheduler),
        } | settings  # fmt: skip
        return NextFlowDiffusionDecoder(
            base=config_of(base), vae=config_of(vae), base_model=base, vae_model=vae,
            **tokenizer_arguments(vq_model), **settings,
        ).eval()  # fmt: skip


def save_pipeline_folder(folder, kind):
    """A folder of a text-to-image pipeline with a random denoiser, VAE and scheduler, as diffusers has them."""
    denoiser, scheduler, _ = TRAINED_BASES[kind]
    name = "unet" if kind == "text unet" else "transformer"
    parts = {name: denoiser(), "vae": tiny_vae(), "scheduler": scheduler()}
    for place, part in parts.items():
        part.save_pretrained(folder / place)
    index = {place: ["diffusers", type(part).__name__] for place, part in parts.items()}
    index |= {"_class_name": "DiffusionPipeline", "_diffusers_version": "0.36.0"}
    (folder / DiffusionPipeline.config_name).write_text(json.dumps(index))
    return folder
