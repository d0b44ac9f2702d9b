"""What is applied to every image before a pipeline returns it: a safety checker, a watermark, its provenance."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..generation.sampling import Generators, ImageSampling
from ..utils.provenance import GeneratedImage
from ..utils.short_repr import short_repr


class FinishedImagesMixin:
    """Hooks of a [`NextFlowPipeline`], set as attributes; by default there are none.

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
        self, images: Sequence[Image.Image], rows: Sequence[int], generator: Generators, sampling: ImageSampling, **more
    ) -> list[Image.Image]:
        """PIL images with their provenance; `rows` are their numbers among the call's generators."""
        if not self.adds_provenance:
            return list(images)
        # Not the path, which would reveal where the model is on the user's disk.
        name = str(self.config.get("_name_or_path") or self.unwrapped_model.name_or_path)
        checkpoint = os.path.basename(os.path.normpath(name)) if os.path.exists(name) else name
        settings = sampling.to_dict() | {key: value for key, value in more.items() if value is not None}
        result = []
        for image, row in zip(images, rows):
            # An image with a generator of its own does not depend on its place in the batch.
            is_own = isinstance(generator, Sequence)
            own, place = (generator[row], {}) if is_own else (generator, {"image": row})
            record = {"checkpoint": checkpoint, "seed": None if own is None else own.initial_seed()} | place
            result.append(GeneratedImage.of(image, record | {"settings": settings}))
        return result


def is_flag(flag) -> bool:
    """The truth value that a flag holds. Raises `TypeError` for anything else."""
    if not isinstance(flag, bool | np.bool_) and not (torch.is_tensor(flag) and flag.dtype == torch.bool):
        raise TypeError("a flag is True or False")
    return bool(flag)
