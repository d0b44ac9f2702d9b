"""PSNR and SSIM, and contact sheets of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..utils.atomic_files import write_with_fallback
from ..utils.user_warnings import warn_user


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, 3, H, W) in [0, 1]; equal images give 100 dB."""
    return decibels((images.float() - references.float()).square().flatten(1).mean(1))


def decibels(squared_error: torch.Tensor | float) -> torch.Tensor:
    """The PSNR in dB of a mean squared error of values in [0, 1]; an error of zero gives 100 dB."""
    return -10 * torch.as_tensor(squared_error).clamp_min(1e-10).log10()


def generator_of(seed: int, index: int) -> torch.Generator:
    """The generator for image `index` of a seed in the suites, which does not depend on other images of the batch."""
    return torch.Generator().manual_seed(100_000 * seed + index)


def ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity (B,) of images (B, 3, H, W) in [0, 1], with Wang et al.'s 11-pixel Gaussian window."""
    offsets = torch.arange(11.0, device=images.device) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()
    kernel = (window[:, None] * window[None]).expand(3, 1, 11, 11)

    def blur(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, kernel, groups=3)

    x, y = images.float(), references.float()
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    return (luminance * structure).flatten(1).mean(1)


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """Pixels (…, 3, H, W) in [-1, 1] → (…, H, W, 3) uint8."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def contact_sheet(rows: Sequence[Sequence[Image.Image]], margin: int = 4) -> Image.Image:
    """Rows of images on one grey sheet; images may differ in size, the largest sets the cell."""
    width = max(image.width for row in rows for image in row) + margin
    height = max(image.height for row in rows for image in row) + margin
    sheet = Image.new("RGB", (max(map(len, rows)) * width + margin, len(rows) * height + margin), (200, 200, 200))
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            sheet.paste(image, (margin + left * width, margin + top * height))
    return sheet


def save_sheet(rows: Sequence[Sequence[Image.Image]], path: Path):
    """Write a contact sheet. If that fails there is only a warning, so that the scores are not lost."""
    try:
        write_with_fallback(path, contact_sheet(rows).save)
    except OSError as error:
        warn_user(str(error))
