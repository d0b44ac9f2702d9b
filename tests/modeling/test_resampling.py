"""Resampling by matrices: equal to torch's interpolation in value and gradient, in all precisions, modes and graphs."""

import pytest
import torch
import torch.nn.functional as F

from transformers_nextflow.scale_schedule import SQUARE_SIDES
from transformers_nextflow.vision_tokenizer.resampling import interpolation_matrix, resample


MODES = ("area", "bicubic", "bilinear", "nearest")
FINAL = (16, 16)
GRIDS = [((h, h), FINAL) for h in SQUARE_SIDES if h < 16]
GRIDS += [(FINAL, grid) for grid, _ in GRIDS]
# Not square, one side alone, one side up and the other down, and sides that no schedule has.
GRIDS += [((3, 5), (7, 11)), ((4, 6), (4, 9)), ((4, 6), (9, 6)), ((9, 2), (3, 7)), ((2, 9), (7, 3)), ((64, 48), (5, 1))]


def interpolate(features: torch.Tensor, grid: tuple[int, int], mode: str) -> torch.Tensor:
    align = {"align_corners": False} if mode in ("bicubic", "bilinear") else {}
    return F.interpolate(features, size=grid, mode=mode, **align)


def value_and_gradient(function, features, *args) -> tuple[torch.Tensor, torch.Tensor]:
    features = features.clone().requires_grad_()
    result = function(features, *args)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return result.detach(), torch.autograd.grad((result * weights).sum(), features)[0]


@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients_are_those_of_interpolation(mode):
    for source, target in GRIDS:
        features = torch.randn(2, 3, *source, generator=torch.Generator().manual_seed(0))
        found, expected = (value_and_gradient(f, features, target, mode) for f in (resample, interpolate))
        for mine, other in zip(found, expected):
            torch.testing.assert_close(mine, other, atol=1e-6 * other.abs().max().item(), rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_other_precisions_are_rounded_once_and_kept_under_autocast(mode):
    features = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    exact = interpolate(features.double(), (8, 3), mode)
    torch.testing.assert_close(resample(features.double(), (8, 3), mode), exact, atol=1e-12, rtol=0)
    half = resample(features.bfloat16(), (8, 3), mode)
    assert torch.equal(half, resample(features.bfloat16().float(), (8, 3), mode).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = resample(features, (8, 3), mode)
    assert torch.equal(under_autocast, resample(features, (8, 3), mode))


def test_a_matrix_made_in_inference_mode_or_under_another_device_serves_a_training():
    with torch.inference_mode(), torch.device("meta"):
        matrix = interpolation_matrix(13, 11, "bicubic", torch.float32, torch.device("cpu"))
        assert matrix.device.type == "cpu"
    features = torch.randn(1, 1, 13, 13, requires_grad=True)
    resample(features, (11, 11), "bicubic").sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_it_compiles_in_one_graph(mode):
    features = torch.randn(2, 3, 4, 4)
    compiled = torch.compile(resample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, (7, 6), mode), resample(features, (7, 6), mode))
