"""Which decoder turns codes into pixels: the tokenizer's own, or a diffusion decoder beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from PIL import Image

from ..diffusion_decoder.condition import condition_fingerprint
from ..diffusion_decoder.decoding import decode_codes
from ..diffusion_decoder.modeling_diffusion_decoder import NextFlowDiffusionDecoder
from ..diffusion_decoder.settings import DiffusionSettings
from ..generation.sampling import Generators
from ..modeling_nextflow_vq import NextFlowVQModel
from ..scale_schedule import ScaleSchedule
from ..utils.short_repr import short_repr
from ..vision_tokenizer.resampling import resample


DECODERS = ("pixel", "diffusion")


def load_diffusion_decoder(folder, dtype, device: torch.device, **options) -> NextFlowDiffusionDecoder:
    """A diffusion decoder on the device of the model; a `dtype` that is none, such as "auto", leaves it in float32."""
    decoder = NextFlowDiffusionDecoder.from_pretrained(folder, **options)
    return decoder.to(device, dtype) if isinstance(dtype, torch.dtype) else decoder.to(device)


class DecodingMixin:
    """Decodes the codes of a [`NextFlowPipeline`]."""

    def check_diffusion_decoder(self, decoder: NextFlowDiffusionDecoder | None, model):
        """Raises `ValueError` for an object that is no diffusion decoder, and for the decoder of another tokenizer."""
        if decoder is None:
            return
        if not isinstance(decoder, NextFlowDiffusionDecoder):
            raise ValueError(
                f"diffusion_decoder must be a NextFlowDiffusionDecoder, got {short_repr(decoder)}; load one with its "
                "from_pretrained."
            )
        if not isinstance(model.vq_model, NextFlowVQModel):
            raise ValueError(
                f"A diffusion decoder reads codes of a NextFlowVQModel, and {type(model).__name__} has a "
                f"{type(model.vq_model).__name__}; leave diffusion_decoder out."
            )
        decoder.check_condition(condition_fingerprint(model.vq_model))

    def _diffusion_settings(
        self, decoder: str, steps: int | None, guidance_scale: float | None, schedules: Iterable[ScaleSchedule] = ()
    ) -> DiffusionSettings | None:
        """The settings of the diffusion decoder, `None` for the pixel decoder.

        Raises:
            ValueError: for a missing or unknown decoder, settings out of range, and sizes that it does not support.
        """
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {DECODERS}, got {short_repr(decoder)}.")
        if decoder == "pixel":
            if steps is not None or guidance_scale is not None:
                raise ValueError(
                    "decoder_steps and decoder_guidance_scale are only for decoder='diffusion'; the pixel decoder has "
                    "none."
                )
            return None
        if self.diffusion_decoder is None:
            raise ValueError(
                "This pipeline has no diffusion decoder; load it with from_pretrained(..., diffusion_decoder=folder), "
                "on the command line name it by --decoder folder, or use decoder='pixel'."
            )
        for schedule in set(schedules):
            self.diffusion_decoder.sample_shape(schedule.final_grid)
        return DiffusionSettings.of(self.diffusion_decoder, steps, guidance_scale)

    def _decoded(
        self,
        image_tokens: torch.Tensor,
        image_grids: torch.Tensor,
        settings: DiffusionSettings | None,
        generator: Generators,
        prompts: list[str] | None = None,
    ) -> list[torch.Tensor]:
        """Images (3, H, W) in [-1, 1] of codes (B, n) padded with -1."""
        if settings is None:
            return self.model.decode_image_tokens(image_tokens, image_grids)
        vq_model = self.unwrapped_model.vq_model
        patch_size, schedules = vq_model.config.patch_size, vq_model.config.scale_schedules
        sizes = [schedules.for_size(*(side * patch_size for side in grid)) for grid in image_grids.tolist()]
        return decode_codes(self.diffusion_decoder, vq_model, image_tokens, sizes, settings, generator, prompts)

    def _paste_back_pixels(self, request, pixels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Images with the request's own pixels outside of its regions, enlarged if the decoder enlarges."""
        pasted = []
        for region, image, own in zip(request.regions, pixels, request.pixels):
            factor = image.shape[-1] // own.shape[-1]
            region = region.to(image.device).repeat_interleave(factor, 0).repeat_interleave(factor, 1)
            own = resample(own[None].to(image), tuple(image.shape[-2:]), "bicubic")[0].clamp(-1, 1)
            pasted.append(torch.where(region, image, own))
        return pasted


def resized_like(image: Image.Image, like: Image.Image) -> Image.Image:
    """An image, resized to the size of another one."""
    return image if image.size == like.size else image.resize(like.size, Image.Resampling.BICUBIC)


def generators_of_rows(generator: Generators, rows: Sequence[int]) -> Generators:
    """The generators of the given rows, if every row has its own; else the one generator."""
    return [generator[row] for row in rows] if isinstance(generator, Sequence) else generator


def decoder_provenance(settings: DiffusionSettings | None) -> dict[str, str | int | float]:
    """The entries about the decoder in the provenance of an image; none for the tokenizer's own decoder."""
    if settings is None:
        return {}
    steps, scale = settings.num_inference_steps, settings.guidance_scale
    return {"decoder": "diffusion", "decoder_steps": steps, "decoder_guidance_scale": scale}
