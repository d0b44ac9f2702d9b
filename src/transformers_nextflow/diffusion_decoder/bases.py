"""The denoisers of diffusers that can be a base, and how each is called: a new one is an entry of `BASES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class PromptEmbeddings:
    """A prompt as the text branch of a base reads it.

    Args:
        tokens: (B, L, D).
        pooled: (B, P); `None` for a base without pooled embeddings.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None

    @classmethod
    def nothing(cls, base: nn.Module, like: torch.Tensor) -> PromptEmbeddings:
        """One token of zeros for each row of `like`, in place of a prompt."""
        config = base.config
        width = config.get("joint_attention_dim") or config.get("cross_attention_dim")
        pooled = config.get("pooled_projection_dim")
        return cls(like.new_zeros(len(like), 1, width), None if pooled is None else like.new_zeros(len(like), pooled))

    def to(self, like: torch.Tensor) -> PromptEmbeddings:
        return PromptEmbeddings(self.tokens.to(like), None if self.pooled is None else self.pooled.to(like))


class WidenedInput(nn.Module):
    """The first layer of a base's visual branch with more input channels: those of the condition come last.

    The layer's own weights stay in a separate module, so that they can be frozen while those of the condition are
    trained.
    """

    def __init__(self, own: nn.Conv2d | nn.Linear, added_channels: int):
        super().__init__()
        self.own = own
        if isinstance(own, nn.Conv2d):
            self.dim, self.split = 1, own.in_channels
            added = (added_channels, own.out_channels, own.kernel_size, own.stride, own.padding)
            self.condition: nn.Module = nn.Conv2d(*added, bias=False)
        else:
            self.dim, self.split = -1, own.in_features
            self.condition = nn.Linear(added_channels, own.out_features, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        own, condition = inputs.tensor_split([self.split], self.dim)
        return self.own(own) + self.condition(condition)


@dataclass(frozen=True)
class Base:
    """A kind of denoiser.

    Args:
        input_layer: the name of the first layer of its visual branch.
        call: `call(base, inputs, time, prompt)` → prediction; `inputs` (B, C, H, W) with the condition's channels last,
            `time` (B,) in [0, 1].
        packing: side of the squares of latents that become one token.
        reads_text: whether it has a text branch.
        takes_lora: whether adapters can be put into it.
    """

    input_layer: str
    call: Callable[[nn.Module, torch.Tensor, torch.Tensor, PromptEmbeddings | None], torch.Tensor]
    packing: int = 1
    reads_text: bool = True
    takes_lora: bool = True

    def channels(self, base: nn.Module) -> int:
        """Channels of the images or latents that it denoises."""
        return base.config.in_channels // self.packing**2

    def multiple(self, base: nn.Module) -> int:
        """The number by which the sides of the images or latents must be divisible."""
        if "block_out_channels" in base.config:
            return 2 ** (len(base.config.block_out_channels) - 1)
        return max(self.packing, base.config.patch_size)

    def widen(self, base: nn.Module, channels: int):
        """Add the condition's `channels` to the input of its visual branch."""
        owner_name, _, name = self.input_layer.rpartition(".")
        owner = base.get_submodule(owner_name)
        setattr(owner, name, WidenedInput(getattr(owner, name), channels * self.packing**2))


def _call_unet(base, inputs, time, prompt):
    return base(inputs, time * TIMESTEPS).sample


def _call_text_unet(base, inputs, time, prompt):
    return base(inputs, time * TIMESTEPS, encoder_hidden_states=prompt.tokens).sample


def _call_sd3(base, inputs, time, prompt):
    return base(
        inputs, encoder_hidden_states=prompt.tokens, pooled_projections=prompt.pooled, timestep=time * TIMESTEPS
    ).sample


def _call_flux(base, inputs, time, prompt):
    height, width = inputs.shape[-2] // 2, inputs.shape[-1] // 2
    tokens = F.pixel_unshuffle(inputs, 2).flatten(2).transpose(1, 2)
    rows, columns = torch.arange(height), torch.arange(width)
    places = torch.stack([torch.zeros(height, width), *torch.meshgrid(rows, columns, indexing="ij")], -1).flatten(0, 1)
    guidance = torch.ones_like(time) if base.config.guidance_embeds else None
    predicted = base(
        tokens, encoder_hidden_states=prompt.tokens, pooled_projections=prompt.pooled, timestep=time, guidance=guidance,
        img_ids=places.to(inputs), txt_ids=inputs.new_zeros(prompt.tokens.shape[1], 3),
    ).sample  # fmt: skip
    return F.pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (height, width)), 2)


# The number of steps in which bases count time.
TIMESTEPS = 1000
BASES = {
    "UNet2DModel": Base("conv_in", _call_unet, reads_text=False, takes_lora=False),
    "UNet2DConditionModel": Base("conv_in", _call_text_unet),
    "SD3Transformer2DModel": Base("pos_embed.proj", _call_sd3),
    "FluxTransformer2DModel": Base("x_embedder", _call_flux, packing=2),
}
# Projections of attention.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def find_base(config: dict) -> Base:
    """The kind of a denoiser with this config. Raises `ValueError` for a kind that is not in `BASES`."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in BASES:
        raise ValueError(f"{name} is not supported as the base of a diffusion decoder; use one of {', '.join(BASES)}.")
    if config.get("addition_embed_type"):
        raise ValueError(f"A {name} with addition_embed_type reads more than a prompt; use a base without it.")
    return BASES[name]


def make_base(config: dict) -> nn.Module:
    """A denoiser with this config and random weights."""
    find_base(config)
    return getattr(diffusers, config["_class_name"]).from_config(dict(config))


def add_lora(base: nn.Module, rank: int):
    """Add adapters to its attention; besides them only the input weights of the condition are trained then."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("A base with LoRA needs peft: pip install transformers-nextflow[peft]") from error
    base.requires_grad_(False)
    base.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, init_lora_weights="gaussian"))
