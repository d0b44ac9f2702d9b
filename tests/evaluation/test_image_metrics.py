"""PSNR and SSIM against loops that follow their definitions, and the sheets."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_nextflow.evaluation.image_metrics import contact_sheet, psnr, ssim, to_uint8


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images (2, 3, 12, 13) in [0, 1], and two that are like them."""
    generator = torch.Generator().manual_seed(0)
    references = torch.rand(2, 3, 12, 13, generator=generator)
    noise = torch.randn(2, 3, 12, 13, generator=generator) * torch.tensor([0.05, 0.3])[:, None, None, None]
    return (references + noise).clamp(0, 1), references


def slow_ssim(x: list[list[float]], y: list[list[float]]) -> float:
    """Mean over all places of the window, of one channel; every weighted moment is a loop."""
    weights = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    total = sum(weights) ** 2
    values = []
    for top in range(len(x) - 10):
        for left in range(len(x[0]) - 10):
            window = [
                (weights[i] * weights[j] / total, x[top + i][left + j], y[top + i][left + j])
                for i in range(11)
                for j in range(11)
            ]
            mean_x, mean_y = sum(w * a for w, a, _ in window), sum(w * b for w, _, b in window)
            variance_x = sum(w * (a - mean_x) ** 2 for w, a, _ in window)
            variance_y = sum(w * (b - mean_y) ** 2 for w, _, b in window)
            covariance = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in window)
            similar = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
            values.append(similar / ((mean_x**2 + mean_y**2 + 1e-4) * (variance_x + variance_y + 9e-4)))
    return sum(values) / len(values)


def test_psnr_equals_its_definition(images):
    values = psnr(*images)
    for value, image, reference in zip(values, *images):
        pairs = list(zip(image.flatten().tolist(), reference.flatten().tolist()))
        error = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
        assert float(value) == pytest.approx(10 * math.log10(1 / error), abs=1e-3)
    assert values[0] > values[1] + 10
    assert psnr(images[0], images[0]).tolist() == [100, 100]


def test_ssim_equals_its_definition(images):
    values = ssim(*images)
    for value, image, reference in zip(values, *images):
        expected = sum(slow_ssim(a.tolist(), b.tolist()) for a, b in zip(image, reference)) / 3
        assert float(value) == pytest.approx(expected, abs=1e-4)
    assert values[0] > values[1]
    torch.testing.assert_close(ssim(images[0], images[0]), torch.ones(2))


def test_pixels_become_the_nearest_bytes_with_channels_last():
    pixels = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5, -1 + 1.4 / 127.5, -1 + 1.6 / 127.5]).expand(2, 3, 1, 7)
    result = to_uint8(pixels)
    assert result.shape == (2, 1, 7, 3) and result.dtype == np.uint8
    assert result[1, 0, :, 2].tolist() == [0, 0, 128, 255, 255, 1, 2]


def test_a_contact_sheet_has_a_cell_for_each_image():
    red, blue = Image.new("RGB", (8, 6), (255, 0, 0)), Image.new("RGB", (5, 10), (0, 0, 255))
    sheet = contact_sheet([[red, blue, red], [blue]], margin=2)
    assert sheet.size == (3 * (8 + 2) + 2, 2 * (10 + 2) + 2)
    ground = sheet.getpixel((0, 0))
    assert ground not in ((255, 0, 0), (0, 0, 255))
    shown = {(2, 2): (255, 0, 0), (9, 7): (255, 0, 0), (9, 8): ground, (12, 2): (0, 0, 255), (16, 11): (0, 0, 255)}
    shown |= {(17, 2): ground, (22, 2): (255, 0, 0), (2, 14): (0, 0, 255), (12, 14): ground}
    assert {place: sheet.getpixel(place) for place in shown} == shown
