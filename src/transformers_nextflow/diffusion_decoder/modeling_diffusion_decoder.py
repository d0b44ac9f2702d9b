"""The optional diffusion decoder: codes to a sharper image, of the same size or twice as large (paper, section 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..utils.atomic_files import check_path
from ..utils.checkpoint_checks import (
    check_complete,
    check_floats,
    check_index,
    check_settings,
    check_weights,
    loading_errors,
)
from ..utils.model_cards import DECODER_USE, ModelCardMixin, format_count, with_card
from .bases import PromptEmbeddings, add_lora, find_base, make_base
from .config_checks import check_config, make_module
from .schedulers import is_flow_matching, predictions


Predicts = Literal["velocity", "image", "noise"]
UPSAMPLING = (1, 2)


class NextFlowDiffusionDecoder(ModelCardMixin, ModelMixin, ConfigMixin):
    """A denoiser of images that is conditioned on the codes of a vision tokenizer.

    The condition enters the denoiser through its visual branch: a projection maps the vector of each cell to the cells
    of the denoiser that it covers, as channels beside those of the noisy image. If the base has a text branch, it reads
    the prompt.

    Args:
        base: config of a denoiser of diffusers, one of `BASES`.
        condition_channels: number of channels of the tokenizer's condition, see the function `condition_channels`.
        patch_size: side in pixels of the square that a code covers.
        upsampling: 1 or 2, how many times as large as the tokenizer's the images are.
        projected_channels: channels of the condition at a cell of the denoiser.
        projection_hidden_size: hidden size of an MLP that projects the condition; default: a linear map.
        vae: config of an `AutoencoderKL` in whose latents the base denoises; default: it denoises pixels.
        pixel_cell: without a VAE, side of the squares of pixels that are one cell of the denoiser.
        scheduler: config of a scheduler of diffusers, whose noise is used: of flow matching, or one with betas that
            predicts epsilon or v; default: flow matching.
        predicts: what the base predicts: "velocity" or "image" with flow matching, "noise" with a scheduler that
            predicts epsilon, "velocity" with one that predicts v.
        lora_rank: rank of the adapters that are trained in place of the base; default: the whole base is trained.
        fingerprint: `condition_fingerprint` of the tokenizer that it was trained on; default: any.
        trained_sizes: (height, width) of the tokenizer's images that it was trained on; default: any.
        num_inference_steps, guidance_scale: defaults of decoding.
        base_model, vae_model: modules to use in place of new ones with random weights.

    Raises:
        ValueError: for a base that is not in `BASES`, and settings that do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []
    ignore_for_config = ["base_model", "vae_model"]
    card_title, card_pipeline_tag, card_library = "Diffusion decoder of NextFlow", "image-to-image", "diffusers"
    card_use = DECODER_USE
    save_pretrained = with_card(ModelMixin.save_pretrained)

    @register_to_config
    def __init__(
        self,
        base: dict[str, Any],
        condition_channels: int,
        patch_size: int,
        upsampling: int = 1,
        projected_channels: int = 16,
        projection_hidden_size: int | None = None,
        vae: dict[str, Any] | None = None,
        pixel_cell: int = 1,
        scheduler: dict[str, Any] | None = None,
        predicts: Predicts = "velocity",
        lora_rank: int | None = None,
        fingerprint: str | None = None,
        trained_sizes: Sequence[Sequence[int]] | None = None,
        num_inference_steps: int = 8,
        guidance_scale: float = 1.0,
        base_model: nn.Module | None = None,
        vae_model: AutoencoderKL | None = None,
    ):
        super().__init__()
        check_config(self.config, type(self).__init__)
        self.kind = find_base(base)
        self.denoiser = base_model if base_model is not None else make_module(make_base, base, "base")
        self.autoencoder = vae_model
        if vae_model is None and vae is not None:
            self.autoencoder = make_module(AutoencoderKL.from_config, vae, "vae")
        if self.autoencoder is not None:
            self.autoencoder.eval().requires_grad_(False)
        self._check_settings()
        side = self.cells_per_code
        widths = [condition_channels, projection_hidden_size, projected_channels * side**2]
        widths = [width for width in widths if width is not None]
        layers: list[nn.Module] = [nn.Linear(*pair, bias=False) for pair in zip(widths, widths[1:])]
        if len(layers) == 2:
            layers.insert(1, nn.SiLU())
        self.projection = nn.Sequential(*layers)
        if lora_rank is not None:
            # Before the input is widened, since its new weights are trained without adapters.
            add_lora(self.denoiser, lora_rank)
        self.kind.widen(self.denoiser, projected_channels)
        if base_model is not None:
            # The new weights of a trained base start from zeros, so that it first behaves as before.
            nn.init.zeros_(self.denoiser.get_submodule(self.kind.input_layer).condition.weight)
        # A function that encodes prompts for the text branch of the base, if it has one; it is not saved.
        self.text_encoder: Callable[[list[str]], PromptEmbeddings] | None = None

    def _check_settings(self):
        config = self.config
        if config.upsampling not in UPSAMPLING:
            raise ValueError(f"upsampling must be one of {UPSAMPLING}, got {config.upsampling!r}.")
        possible = predictions(config.scheduler)
        if config.predicts not in possible:
            name = "flow matching" if self.is_flow_matching else "this scheduler"
            raise ValueError(f"predicts={config.predicts!r} does not go with {name}; use {' or '.join(possible)}.")
        if config.lora_rank is not None and not self.kind.takes_lora:
            raise ValueError(f"{config.base['_class_name']} does not support LoRA; leave lora_rank out.")
        if config.patch_size * config.upsampling % self.pixels_per_cell:
            raise ValueError(
                f"A code covers {config.patch_size * config.upsampling} pixels a side, and a cell of the denoiser "
                f"{self.pixels_per_cell}, which does not divide it; choose another pixel_cell or VAE."
            )
        own, needed = self.kind.channels(self.denoiser), self._channels
        if own != needed:
            raise ValueError(f"The base denoises {own} channels, and the images or latents here have {needed}.")

    @property
    def is_flow_matching(self) -> bool:
        return is_flow_matching((self.config.scheduler or {}).get("_class_name", "FlowMatch"))

    @property
    def pixels_per_cell(self) -> int:
        """The side in pixels of one cell of the denoiser."""
        if self.autoencoder is None:
            return self.config.pixel_cell
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    @property
    def cells_per_code(self) -> int:
        """The side, in cells of the denoiser, of the square that a code covers."""
        return self.config.patch_size * self.config.upsampling // self.pixels_per_cell

    @property
    def _channels(self) -> int:
        return 3 * self.config.pixel_cell**2 if self.autoencoder is None else self.autoencoder.config.latent_channels

    def sample_shape(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """The shape (C, H, W) of the noise for an image with the final grid (h, w) of codes.

        Raises:
            ValueError: for a size that it was not trained for, or whose sides the base cannot divide.
        """
        size = tuple(side * self.config.patch_size for side in grid)
        trained = self.config.trained_sizes
        if trained is not None and size not in [tuple(own) for own in trained]:
            own = " and ".join("x".join(map(str, one)) for one in trained)
            raise ValueError(
                f"This diffusion decoder was trained on images of {own} pixels (height x width), got "
                f"{size[0]}x{size[1]}; draw one of those, or use decoder='pixel'."
            )
        height, width = (side * self.cells_per_code for side in grid)
        multiple = self.kind.multiple(self.denoiser)
        if height % multiple or width % multiple:
            raise ValueError(
                f"The base of this diffusion decoder takes sides that are multiples of {multiple} cells, and an image "
                f"of {size[0]}x{size[1]} pixels has {height}x{width}; use decoder='pixel' for this size."
            )
        return self._channels, height, width

    def check_condition(self, fingerprint: str):
        """Raises `ValueError` for a tokenizer that is not the one it was trained on."""
        own = self.config.fingerprint
        if own is not None and own != fingerprint:
            raise ValueError(
                f"This diffusion decoder was trained on the codes of the tokenizer {own}, and the model's is "
                f"{fingerprint}; use the decoder of this model, or decoder='pixel'."
            )

    # Its card ---------------------------------------------------------------------------------------------------------

    @property
    def name_or_path(self) -> str:
        """What it was loaded from, or the base that it begins with; empty for random weights."""
        return str(self.config.get("_name_or_path") or "")

    def card_text(self) -> str:
        config = self.config
        size = "of the same size" if config.upsampling == 1 else "twice as large"
        sizes = " and ".join("x".join(map(str, one)) for one in config.trained_sizes or ())
        text = f"{self.card_title} ({self.card_origin}, section 2.4): it turns the codes of an image into a sharper "
        text += (
            f"image {size}, which need not be strictly what the pixel decoder draws. A {config.base['_class_name']} "
        )
        text += f"that predicts {config.predicts}; {format_count(self.num_parameters())} parameters"
        text += f", of which adapters of rank {config.lora_rank} were trained" if config.lora_rank else ""
        text += f"; {config.num_inference_steps} steps by default"
        return text + (f"; for images of {sizes} pixels (height x width)." if sizes else ".")

    # Pixels to what is denoised, and back -----------------------------------------------------------------------------

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """The images or latents (B, C, H, W) that the base denoises, from pixels (B, 3, …) in [-1, 1]."""
        if self.autoencoder is None:
            return F.pixel_unshuffle(pixels, self.config.pixel_cell)
        latents = self.autoencoder.encode(pixels.to(self.autoencoder.dtype)).latent_dist.mode().float()
        return (latents - (self.autoencoder.config.shift_factor or 0.0)) * self.autoencoder.config.scaling_factor

    @torch.no_grad()
    def decode_pixels(self, sample: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, …) in [-1, 1] from denoised images or latents (B, C, H, W)."""
        if self.autoencoder is None:
            return F.pixel_shuffle(sample, self.config.pixel_cell).clamp(-1, 1)
        latents = sample / self.autoencoder.config.scaling_factor + (self.autoencoder.config.shift_factor or 0.0)
        return self.autoencoder.decode(latents.to(self.autoencoder.dtype)).sample.float().clamp(-1, 1)

    def forward(
        self,
        sample: torch.Tensor,
        time: torch.Tensor,
        condition: torch.Tensor | None = None,
        prompt: PromptEmbeddings | None = None,
    ) -> torch.Tensor:
        """The prediction (B, C, H, W) of the base.

        Args:
            sample: (B, C, H, W) noisy images or latents.
            time: (B,) in [0, 1], 1 for noise only.
            condition: (B, D, h, w), see `code_condition`; zeros and `None` are the unconditional case.
            prompt: the prompt for a base with a text branch; default: one token of zeros.
        """
        weight = self.projection[0].weight
        # In half precision times would be rounded by up to two of a thousand steps; bases round what they make of them.
        sample, time = sample.to(weight.dtype), time.to(sample.device, torch.float32)
        side, channels = self.cells_per_code, self.config.projected_channels
        if condition is None:
            projected = sample.new_zeros(len(sample), channels, *sample.shape[-2:])
        else:
            projected = self.projection(condition.to(sample).movedim(1, -1)).movedim(-1, 1)
            projected = F.pixel_shuffle(projected, side)
        if self.kind.reads_text:
            prompt = PromptEmbeddings.nothing(self.denoiser, sample) if prompt is None else prompt.to(sample)
        return self.kind.call(self.denoiser, torch.cat([sample, projected], 1), time, prompt)

    def gradient_checkpointing_enable(self, **options):
        """As `Trainer` asks for it of models of transformers: activations of the base are computed twice, not kept."""
        self.enable_gradient_checkpointing()

    # Where decoders come from -----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> NextFlowDiffusionDecoder:
        """As in diffusers. Raises `ValueError` naming tensors that are missing, or that are no finite floats."""
        with_info = kwargs.pop("output_loading_info", False)
        check_path(pretrained_model_name_or_path)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        with loading_errors(pretrained_model_name_or_path):
            check_settings(folder)
            check_index(folder)
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        check_complete(info["missing_keys"])
        check_floats(map(str, folder.glob("*.safetensors")), info["unexpected_keys"])
        check_weights(model)
        return (model, info) if with_info else model

    @torch.no_grad()
    def upsampled(self) -> NextFlowDiffusionDecoder:
        """A decoder for images twice as large, to be trained further (second stage): each cell of the denoiser starts
        with the condition of the cell that covered it.
        """
        if self.config.upsampling != 1:
            raise ValueError("This diffusion decoder already gives images twice as large.")
        settings = {name: value for name, value in self.config.items() if not name.startswith("_")}
        larger = type(self)(**settings | {"upsampling": 2})
        weights, (old, new) = self.state_dict(), (self.cells_per_code, larger.cells_per_code)
        name = f"projection.{len(self.projection) - 1}.weight"
        rows = weights[name].unflatten(0, (-1, old, old))
        rows = rows.repeat_interleave(new // old, 1).repeat_interleave(new // old, 2)
        larger.load_state_dict(weights | {name: rows.flatten(0, 2)})
        return larger.to(self.dtype)
