"""The output of a call of the pipeline, and how a notebook shows it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from .notebook_display import as_html, to_pil


Images = list[Image.Image] | np.ndarray | torch.Tensor


@dataclass
class NextFlowPipelineOutput(BaseOutput):
    """Images and their codes.

    Args:
        images: a list of PIL images, or (B, H, W, 3) numpy, or a (B, 3, H, W) tensor; floats lie in [0, 1]. With
            `output_type="latent"` they are the codes.
        image_tokens: (B, N) codes, padded with -1 if images differ in size. If the drawing was interrupted, there are
            fewer columns, or -1 in them.
        thoughts: with `think=True` the text that was written before each image.
        candidate_scores: with `num_candidates` above 1 the (B, num_candidates) scores of all candidates.
        nsfw_content_detected: for each image whether the pipeline's `safety_checker`, if there is one, found it unsafe.
        previews: with `preview=True` for each image of `images` the images after each scale.
    """

    images: Images
    image_tokens: torch.LongTensor
    thoughts: list[str] | None = None
    candidate_scores: torch.Tensor | None = None
    nsfw_content_detected: list[bool] | None = None
    previews: list[list[Image.Image]] | None = None

    def _repr_html_(self) -> str:
        images = to_pil(self.images)
        if images is None:
            return f"<pre>codes {tuple(self.image_tokens.shape)}</pre>"
        return as_html(self.previews or [images])
