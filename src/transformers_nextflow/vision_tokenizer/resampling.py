"""Resampling of features between grids: torch's interpolations as matrix products, and rotary resampling.

Interpolation between two grids is a fixed linear map, separate for rows and columns. So it is two products with small
matrices, which are computed once for each pair of sides. The values are those of `torch.nn.functional.interpolate`; the
backward pass is two products too, while torch's bicubic kernel uses slow atomic additions on a GPU.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers.utils.generic import maybe_autocast

from ..scale_schedule import Grid


# How many places along each side of an image rotary resampling distinguishes: frequencies are zero to three cycles.
ROTARY_PLACES = 4


def resample(features: torch.Tensor, grid: Grid, mode: str) -> torch.Tensor:
    """Resample features (B, C, h, w) to another grid, in their precision; for the same grid returns the same tensor.

    `mode` is one of torch's ("area", "nearest", "bilinear", "bicubic", without aligned corners) or "rotary", see
    `resample_rotary`. Autocast has no effect.
    """
    if tuple(features.shape[-2:]) == tuple(grid):
        return features
    with maybe_autocast(features.device.type, enabled=False):
        if mode == "rotary":
            return resample_rotary(features, grid)
        if mode == "nearest":  # a copy, faster than any product
            return F.interpolate(features, size=tuple(grid), mode=mode)
        # Products in half precision would round twice, and the matrices too.
        exact = features if features.dtype == torch.float64 else features.float()
        height, width = exact.shape[-2:]
        sides = [(-1, width, grid[1]), (-2, height, grid[0])]
        # Columns are one product with the whole batch, so they are resampled when the other side is smaller.
        for dim, source, target in sides if height <= grid[0] else reversed(sides):
            if source != target:
                matrix = interpolation_matrix(source, target, mode, exact.dtype, exact.device)
                exact = exact @ matrix.T if dim == -1 else matrix @ exact
        return exact.to(features.dtype)


def interpolation_matrix(source: int, target: int, mode: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix (target, source): the share of each of `source` cells of a side in each of `target` cells."""
    # A graph that is being compiled cannot use the cache; there the matrix is computed by a few small operations.
    made = _matrix.__wrapped__ if torch.compiler.is_compiling() else _matrix
    return made(source, target, mode, dtype, device)


@lru_cache(maxsize=512)
def _matrix(source: int, target: int, mode: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Not an inference tensor, even if it is first computed in inference mode, so that training can use it too.
    with torch.inference_mode(False), torch.no_grad():
        # The interpolation of each unit vector, as an image of one column, gives a column of the matrix.
        cells = torch.eye(source, dtype=dtype, device="cpu").view(source, 1, source, 1)
        align = {"align_corners": False} if mode in ("bicubic", "bilinear") else {}
        reached = F.interpolate(cells, size=(target, 1), mode=mode, **align)
        return reached.view(source, target).T.contiguous().to(device)


def resample_rotary(features: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Resampling with which a coarse cell keeps the places of its fine cells. The method is ours, not the paper's.

    A plain mean over cells loses their order. Here each fine cell's vector is first rotated by its place in the coarse
    cell, as rotary embeddings do with positions: the mean becomes a superposition from which the vector at each place
    can be read. In upsampling, the coarse vector is copied to its fine cells and rotated back by their places.
    """
    height, width = features.shape[-2:]
    down = grid[0] * grid[1] < height * width
    fine, coarse = ((height, width), grid) if down else (grid, (height, width))
    rows, row_offsets = _parents(fine[0], coarse[0], features.device)
    columns, column_offsets = _parents(fine[1], coarse[1], features.device)
    pair = torch.arange(features.shape[1] // 2, device=features.device)
    row_frequency = (pair // ROTARY_PLACES) % ROTARY_PLACES
    column_frequency = pair % ROTARY_PLACES
    angles = row_frequency[:, None, None] * row_offsets[:, None] + column_frequency[:, None, None] * column_offsets
    angles = 2 * torch.pi * angles
    if down:
        rotated = _rotate(features, angles)
        row_mean = F.one_hot(rows, coarse[0]).T.to(features.dtype)
        column_mean = F.one_hot(columns, coarse[1]).T.to(features.dtype)
        row_mean, column_mean = (mean / mean.sum(1, keepdim=True) for mean in (row_mean, column_mean))
        return row_mean @ rotated @ column_mean.T
    return _rotate(features[:, :, rows][:, :, :, columns], -angles)


def _parents(fine: int, coarse: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of `fine` cells of a side the coarse cell in which it lies, and its distance from that cell's middle."""
    cells = torch.arange(fine, device=device)
    # In whole numbers, so that rounding does not decide where a middle on the edge of two coarse cells belongs.
    parents = (2 * cells + 1) * coarse // (2 * fine)
    return parents, (cells.float() + 0.5) / fine - (parents.float() + 0.5) / coarse


def _rotate(features: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels of (B, C, h, w) by angles (C/2, h, w); an odd last channel stays."""
    pairs = 2 * len(angles)
    x, y = features[:, :pairs:2], features[:, 1:pairs:2]
    cos, sin = angles.cos().to(features.dtype), angles.sin().to(features.dtype)
    rotated = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=2).flatten(1, 2)
    return torch.cat([rotated, features[:, pairs:]], dim=1)
