"""Care of the codebook: a start from k-means, and unused codes that are moved to vectors of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...modeling_nextflow_vq import NextFlowVQModel
from ...scale_schedule import ScaleSchedule
from ...vision_tokenizer.multiscale_quantizer import outside_of_autocast
from ...vision_tokenizer.resampling import resample


KMEANS_STEPS = 15
MAX_VECTORS = 32768


@outside_of_autocast
@torch.no_grad()
def initialize_codebook(
    model: NextFlowVQModel, pixel_values: torch.Tensor, shares: Sequence[int] | None = None, seed: int = 0
):
    """Starts both codebooks from k-means over the downsampled residuals of images (B, 3, H, W) at each scale.

    Every scale gets `shares[k]` of the codes (default: equal shares), and its codes leave a residual to the next
    scales.

    Raises:
        ValueError: if the shares are not one for each scale or do not add up to the codebook.
    """
    generator = torch.Generator(pixel_values.device).manual_seed(seed)
    schedule = model.schedule_of(pixel_values)
    latents = _latents(model, pixel_values)
    size = model.config.codebook_size
    count = schedule.num_scales
    shares = shares or [size // count + (i < size % count) for i in range(count)]
    if len(shares) != count or sum(shares) != size:
        raise ValueError(f"Shares {list(shares)} must give {count} scales {size} codes in all.")
    centers: list[torch.Tensor] = []
    residual = latents
    for grid, share in zip(schedule.grids, shares):
        vectors, restore = _vectors(model, residual, grid)
        centers.append(_kmeans(model, vectors, share, generator))
        residual = residual - restore(_nearest(model, vectors, torch.cat(centers)), schedule)
    _write(model, torch.arange(size, device=latents.device), torch.cat(centers))


@outside_of_autocast
@torch.no_grad()
def revive_dead_codes(model: NextFlowVQModel, pixel_values: torch.Tensor, dead: torch.Tensor, seed: int = 0) -> int:
    """Moves the codes marked in `dead` (V,) to vectors of the images (B, 3, H, W); returns how many were moved.

    Every process must pass the same `dead`; the vectors are those of the first process.
    """
    count = int(dead.sum())
    if count == 0:
        return 0
    generator = torch.Generator(pixel_values.device).manual_seed(seed)
    schedule = model.schedule_of(pixel_values)
    residual = _latents(model, pixel_values)
    candidates = []
    for grid in schedule.grids:
        vectors, restore = _vectors(model, residual, grid)
        # The same number from each scale: fine scales have most cells, but coarse codes are as important.
        candidates.append(_draw(vectors, min(len(vectors), count), generator))
        residual = residual - restore(_nearest(model, vectors, model.quantizer.codebook), schedule)
    replacements = _draw(torch.cat(candidates), count, generator)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(replacements, src=0)
    _write(model, dead.nonzero().squeeze(1)[: len(replacements)], replacements)
    return len(replacements)


def _latents(model: NextFlowVQModel, pixel_values: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.encode_latents(chunk) for chunk in pixel_values.split(256)])


def _vectors(model: NextFlowVQModel, residual: torch.Tensor, grid):
    """The vectors (n, C) that a scale compares with codes, and a function that upsamples code vectors (n, C)."""
    config = model.config
    target, vectors = model.quantizer.targets(residual, grid)

    def restore(codes: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
        return resample(codes.view(target.shape).permute(0, 3, 1, 2), schedule.final_grid, config.upsample)

    return vectors.flatten(0, 2), restore


def _draw(vectors: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    return vectors[torch.randperm(len(vectors), generator=generator, device=vectors.device)[:count]]


def _nearest(model: NextFlowVQModel, vectors: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    indices = [model.quantizer.distances(chunk, centers).argmin(-1) for chunk in vectors.split(4096)]
    return centers[torch.cat(indices)]


def _kmeans(model: NextFlowVQModel, vectors: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm under the quantiser's own distance; empty clusters start anew from random vectors."""
    vectors = _draw(vectors, MAX_VECTORS, generator)
    centers = _draw(vectors, count, generator).clone()
    while len(centers) < count:
        noise = torch.randn(centers.shape, generator=generator, device=vectors.device)
        centers = torch.cat([centers, centers + 1e-3 * noise])[:count]
    for _ in range(KMEANS_STEPS):
        assigned = torch.cat([model.quantizer.distances(v, centers).argmin(-1) for v in vectors.split(4096)])
        counts = torch.bincount(assigned, minlength=count)
        sums = torch.zeros_like(centers).index_add_(0, assigned, vectors)
        centers = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), centers)
        empty = (counts == 0).nonzero().squeeze(1)
        centers[empty] = vectors[torch.randint(len(vectors), empty.shape, generator=generator, device=vectors.device)]
        if model.config.normalize_codes:
            centers = model.quantizer.normalize(centers)
    return centers


def _write(model: NextFlowVQModel, indices: torch.Tensor, vectors: torch.Tensor):
    semantic, pixel = vectors.split([model.config.semantic_code_dim, model.config.pixel_code_dim], dim=-1)
    model.quantizer.semantic_codebook.weight.data[indices] = semantic
    model.quantizer.pixel_codebook.weight.data[indices] = pixel
