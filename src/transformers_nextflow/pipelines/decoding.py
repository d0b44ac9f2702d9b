"""From codes to the images that a call returns: a decoder, a safety checker, a watermark, and their provenance."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from PIL import Image

from ..diffusion_decoder.condition import condition_fingerprint
from ..diffusion_decoder.decoding import decode_codes
from ..diffusion_decoder.modeling_diffusion_decoder import NextFlowDiffusionDecoder
from ..diffusion_decoder.settings import DiffusionSettings
from ..generation.sampling import Generators, ImageSampling
from ..modeling_nextflow_vq import NextFlowVQModel
from ..scale_schedule import ScaleSchedule
from ..utils.provenance import GeneratedImage
from ..utils.saved_adapters import active_adapters, unwrap_peft, weight_of
from ..utils.short_repr import short_repr
from ..vision_tokenizer.resampling import resample
from .outputs import Images


DECODERS = ("pixel", "diffusion")
Seeds = int | None | Sequence[int | None]


def load_diffusion_decoder(folder, dtype, device: torch.device, **options) -> NextFlowDiffusionDecoder:
    """A diffusion decoder on the device of the model; a `dtype` that is none, such as "auto", leaves it in float32."""
    decoder = NextFlowDiffusionDecoder.from_pretrained(folder, **options)
    return decoder.to(device, dtype) if isinstance(dtype, torch.dtype) else decoder.to(device)


class DecodingMixin:
    """Makes of codes the images that a call returns. Its hooks are set as attributes; by default there are none.

    Attributes:
        safety_checker: a function with diffusers' interface: `safety_checker(images=…, clip_input=…)` takes an array
            (1, H, W, 3) of floats in [0, 1] and returns such images, and for each whether it was found unsafe. It is
            called on every image, previews and frames of videos included; codes (`image_tokens`, "latent") are not
            checked.
        feature_extractor: makes `clip_input` from PIL images, such as that of a `StableDiffusionSafetyChecker`.
        watermark: an object with `apply_watermark(images)`, which takes and returns (1, 3, H, W) in [-1, 1], such as
            diffusers' `StableDiffusionXLWatermarker`.
        adds_provenance: whether the files of PIL images record what drew them (`utils/provenance.py`).
    """

    safety_checker = None
    feature_extractor = None
    watermark = None
    adds_provenance = True

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """As in diffusers; the new pipeline takes over the hooks of the other one."""
        other = super().from_pipe(pipeline, **kwargs)
        for name in ("safety_checker", "feature_extractor", "watermark", "adds_provenance"):
            if hasattr(pipeline, name):
                setattr(other, name, getattr(pipeline, name))
        return other

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
        vq_model = unwrap_peft(self.model).vq_model
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

    def _checked(self, pixels: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[bool] | None]:
        """Images (3, H, W) in [-1, 1] as they may be seen, and which were found unsafe; `None` if nothing looked."""
        self.check_hooks()
        pixels, flags = list(pixels), None
        if self.safety_checker is not None:
            pairs = [self._run_safety_checker(image) for image in pixels]
            pixels, flags = [image for image, _ in pairs], [flag for _, flag in pairs]
        if self.watermark is not None:
            pixels = [self._watermarked(image) for image in pixels]
        return pixels, flags

    def check_hooks(self):
        """Raises `ValueError` for hooks that are none."""
        for name in ("safety_checker", "feature_extractor"):
            if (hook := getattr(self, name)) is not None and not callable(hook):
                raise ValueError(f"{name} must be a function, as of diffusers, or None, got {short_repr(hook)}.")
        if self.watermark is not None and not callable(getattr(self.watermark, "apply_watermark", None)):
            raise ValueError(
                f"watermark must be an object with apply_watermark, or None, got {short_repr(self.watermark)}."
            )
        if not isinstance(self.adds_provenance, bool):
            raise ValueError(f"adds_provenance must be True or False, got {short_repr(self.adds_provenance)}.")

    def _watermarked(self, image: torch.Tensor) -> torch.Tensor:
        marked = self.watermark.apply_watermark(image[None])
        if not torch.is_tensor(marked) or marked.shape != image[None].shape or not bool(marked.isfinite().all()):
            raise ValueError(
                f"watermark must return a finite tensor of the shape that it gets, {tuple(image[None].shape)}, got "
                f"{short_repr(marked)}."
            )
        return marked[0].to(image)

    def _run_safety_checker(self, image: torch.Tensor) -> tuple[torch.Tensor, bool]:
        values = self.processor.post_process_images([image], "np")[0][None]
        clip_input = None
        if self.feature_extractor is not None:
            shown = [Image.fromarray((values[0] * 255).round().astype("uint8"))]
            clip_input = self.feature_extractor(shown, return_tensors="pt").pixel_values.to(image.device)
        answer = self.safety_checker(images=values, clip_input=clip_input)
        try:
            returned, flags = answer
            kept = returned[0] if torch.is_tensor(returned) else torch.from_numpy(np.array(returned[0]))
            is_unsafe, *others = (is_flag(flag) for flag in flags)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "safety_checker must return as many images and flags as it gets, a flag being True if unsafe; got "
                f"{short_repr(answer)}."
            ) from error
        if others or kept.shape != values.shape[1:] or not (bool(kept.min() >= 0) and bool(kept.max() <= 1)):
            raise ValueError(
                f"safety_checker must return as many images and flags as it gets, images as floats in [0, 1] of the "
                f"shape {values.shape}, got {short_repr(answer)}."
            )
        same = returned is values and not is_unsafe
        return image if same else (kept.to(image).permute(2, 0, 1) * 2 - 1), is_unsafe

    def _with_provenance(
        self,
        images: Sequence[Image.Image],
        rows: Sequence[int],
        seeds: Seeds,
        sampling: ImageSampling,
        image_tokens: Sequence[torch.Tensor],
        image_grids: Iterable[Sequence[int]],
        changed_rows: Collection[int] = (),
        **more,
    ) -> list[Image.Image]:
        """PIL images with their provenance.

        Args:
            rows: their numbers among the call's `seeds`, see `seeds_of`.
            image_tokens, image_grids: their codes and final grids, which tell whether all scales were drawn.
            changed_rows: the rows whose seeds do not repeat them, since a callback changed their codes.
            more: further settings; those that are `None` are left out.
        """
        if not self.adds_provenance:
            return list(images)
        model = unwrap_peft(self.model)
        drawn_by = {"checkpoint": _checkpoint_name(str(self.config.get("_name_or_path") or model.name_or_path))}
        if adapters := active_adapters(model):
            drawn_by["adapters"] = {name: weight_of(model, name) for name in adapters}
        settings = sampling.to_dict() | {key: value for key, value in more.items() if value is not None}
        result = []
        for image, row, codes, grid in zip(images, rows, image_tokens, image_grids):
            # An image with a generator of its own does not depend on its place in the batch.
            own, place = (seeds[row], {}) if isinstance(seeds, Sequence) else (seeds, {"image": row})
            record = drawn_by | {"seed": None if row in changed_rows else own} | place
            schedule = self.processor.image_processor.schedule_for_grid(*grid)
            if (count := int((codes >= 0).sum())) < schedule.num_tokens:
                record["interrupted_after_scales"] = schedule.offsets.index(count)
            result.append(GeneratedImage.of(image, record | {"settings": settings}))
        return result

    def _images(self, pixels: list[torch.Tensor], output_type: str) -> Images:
        images = self.processor.post_process_images(pixels, output_type)
        return {"pil": list, "np": np.stack, "pt": torch.stack}[output_type](images)


def _checkpoint_name(source: str) -> str:
    """A repository of the Hub, or the name of a folder without its path, which would reveal where it is on the disk."""
    is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not os.path.exists(source)
    return source if is_repository or not source else os.path.basename(os.path.abspath(source))


def resized_like(image: Image.Image, like: Image.Image) -> Image.Image:
    """An image, resized to the size of another one."""
    return image if image.size == like.size else image.resize(like.size, Image.Resampling.BICUBIC)


def generators_of_rows(generator: Generators, rows: Sequence[int]) -> Generators:
    """The generators of the given rows, if every row has its own; else the one generator."""
    return [generator[row] for row in rows] if isinstance(generator, Sequence) else generator


def seeds_of(generator: Generators) -> Seeds:
    """The seeds from which a call repeats what it draws, one or one for each image; to be asked for before the drawing.

    `None` where there is no generator, or one that has given numbers before: its seed alone does not repeat the image.
    """
    if isinstance(generator, Sequence):
        return [seeds_of(own) for own in generator]
    if generator is None:
        return None
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return generator.initial_seed() if torch.equal(fresh.get_state(), generator.get_state()) else None


def decoder_provenance(settings: DiffusionSettings | None) -> dict[str, str | int | float]:
    """The entries about the decoder in the provenance of an image; none for the tokenizer's own decoder."""
    if settings is None:
        return {}
    steps, scale = settings.num_inference_steps, settings.guidance_scale
    return {"decoder": "diffusion", "decoder_steps": steps, "decoder_guidance_scale": scale}


def is_flag(flag) -> bool:
    """The truth value that a flag holds. Raises `TypeError` for anything else."""
    if not isinstance(flag, bool | np.bool_) and not (torch.is_tensor(flag) and flag.dtype == torch.bool):
        raise TypeError("a flag is True or False")
    return bool(flag)
