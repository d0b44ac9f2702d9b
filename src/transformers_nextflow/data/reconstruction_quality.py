"""Whether a vision tokenizer can reconstruct images: the PSNR of some, compared with that of its own images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from PIL import Image

from ..evaluation.image_metrics import psnr, to_uint8
from ..image_processing_nextflow import NextFlowImageProcessor
from ..modeling_nextflow_vq import NextFlowVQModel
from ..utils.training_domain import MARGIN
from .row_encoding import read_pixels
from .row_errors import BadRowError
from .rows import read_row


# Of any tokenizer, whatever it makes of its own images. A rule of thumb: photographs of 64 pixels are recognised above.
MIN_PSNR = 18.0


@dataclass
class ReconstructionQuality:
    """A tokenizer's reconstructions of images.

    Args:
        psnr: the PSNR of each reconstruction in dB; more is better.
        own: the lowest PSNR of its training images, if the checkpoint states it (`trained_on`).
        pairs: (original, reconstruction) of each image.
    """

    psnr: list[float] = field(default_factory=list)
    own: float | None = None
    pairs: list[tuple[Image.Image, Image.Image]] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.psnr) / len(self.psnr)

    @property
    def min_psnr(self) -> float:
        """The smallest mean in dB with which it is sufficient."""
        return MIN_PSNR if self.own is None else max(MIN_PSNR, self.own - MARGIN)

    @property
    def is_sufficient(self) -> bool:
        return self.mean >= self.min_psnr

    def __str__(self) -> str:
        own = "it says nothing of its own" if self.own is None else f"its own at {self.own:.1f} dB and more"
        return (
            f"the vision tokenizer reproduces {len(self.psnr)} of the images at {self.mean:.1f} dB on average "
            f"(lowest {min(self.psnr):.1f}, highest {max(self.psnr):.1f}; {own})"
        )


@torch.no_grad()
def measure_reconstruction(
    vq_model: NextFlowVQModel, images: Iterable[torch.Tensor], own: float | None = None
) -> ReconstructionQuality:
    """Reconstruct images (3, H, W) in [-1, 1] of any sizes of the scale schedules.

    Raises:
        ValueError: for no images.
    """
    quality = ReconstructionQuality(own=own)
    for image in images:
        pixels = image[None].to(vq_model.device, torch.float32)
        restored = vq_model.reconstruct(pixels).float()
        quality.psnr.append(psnr(restored / 2 + 0.5, pixels / 2 + 0.5).item())
        quality.pairs.append(tuple(Image.fromarray(to_uint8(one[0])) for one in (pixels, restored)))
    if not quality.psnr:
        raise ValueError("There are no images to reconstruct; rows that hold only codes have none.")
    return quality


def pixels_of(
    rows: Iterable[dict], root: str | os.PathLike, processor: NextFlowImageProcessor, limit: int
) -> Iterator[torch.Tensor]:
    """The first images of rows, as the model reads them, (3, H, W); rows with only codes have none.

    Raises:
        ValueError: naming row and field, for rows that cannot be used.
    """
    count = 0
    for number, row in enumerate(rows):
        try:
            _, images = read_pixels(read_row(row, root), processor)
        except BadRowError as error:
            raise error.of_row(number) from error
        for image in images[: limit - count]:
            yield torch.from_numpy(image)
        count += len(images)
        if count >= limit:
            return
