"""Care of the codebook: a start from k-means, and unused codes that are moved to vectors of the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...modeling_nextflow_vq import NextFlowVQModel
from ...vision_tokenizer.multiscale_quantizer import without_autocast
from ...vision_tokenizer.resampling import resample


KMEANS_STEPS = 15
MAX_VECTORS = 32768
# Of images that are given in one tensor.
BATCH = 256


class _Residuals:
    """The residuals of a batch of images: latents (B, C, h, w) without the codes of the scales so far."""

    def __init__(self, model: NextFlowVQModel, pixel_values: torch.Tensor):
        self.model, self.schedule = model, model.schedule_of(pixel_values)
        self.residual = model.encode_latents(pixel_values)

    def count(self, scale: int) -> int:
        """The number of vectors that a scale quantises."""
        height, width = self.schedule.grids[scale]
        return len(self.residual) * height * width

    def vectors(self, scale: int) -> torch.Tensor:
        """The vectors (n, C) that a scale quantises: the residual, downsampled to its grid."""
        _, vectors = self.model.quantizer.targets(self.residual, self.schedule.grids[scale])
        return vectors.flatten(0, 2)

    def take(self, scale: int, centers: torch.Tensor):
        """Subtract the nearest of the centers (V, C) at a scale from the residual."""
        height, width = self.schedule.grids[scale]
        codes = _nearest(self.model, self.vectors(scale), centers).view(len(self.residual), height, width, -1)
        upsampled = resample(codes.permute(0, 3, 1, 2), self.schedule.final_grid, self.model.config.upsample)
        self.residual = self.residual - upsampled


@without_autocast
@torch.no_grad()
def initialize_codebook(
    model: NextFlowVQModel,
    images: torch.Tensor | Iterable[torch.Tensor],
    shares: Sequence[int] | None = None,
    seed: int = 0,
):
    """Starts both codebooks from k-means over the residuals of the images at each scale.

    Every scale gets `shares[k]` of the codes (default: as many as any other), and the next one quantises the residual
    that they leave. The latents of all images are held in memory, and in k-means `MAX_VECTORS` vectors of a scale.
    Every process must call it; the codes are those of the first process.

    Args:
        images: (B, 3, H, W), or batches of them, each of one size, that are asked for one after another. A scale has
            the vectors of all images that have so many scales.

    Raises:
        ValueError: if the shares are not one for each scale of the largest image, or do not add up to the codebook.
    """
    batches = images.split(BATCH) if isinstance(images, torch.Tensor) else images
    left = [_Residuals(model, pixel_values.to(model.device)) for pixel_values in batches]
    generator = torch.Generator(model.device).manual_seed(seed)
    size = model.config.codebook_size
    count = max(batch.schedule.num_scales for batch in left)
    shares = shares or [size // count + (i < size % count) for i in range(count)]
    if len(shares) != count or sum(shares) != size:
        raise ValueError(f"Shares {list(shares)} must give {count} scales {size} codes in all.")
    centers: list[torch.Tensor] = []
    for scale, share in enumerate(shares):
        having = [batch for batch in left if scale < batch.schedule.num_scales]
        centers.append(_kmeans(model, _sample_scale_vectors(having, scale, generator), share, generator))
        for batch in having:
            batch.take(scale, torch.cat(centers))
    codes = torch.cat(centers)
    if torch.distributed.is_initialized():
        # The order of additions on a GPU differs by processes, and k-means makes large differences of small ones.
        codes = _broadcast_from_first(codes)
    _write(model, torch.arange(size, device=model.device), codes)


def _sample_scale_vectors(batches: Sequence[_Residuals], scale: int, generator: torch.Generator) -> torch.Tensor:
    """At most `MAX_VECTORS` of the vectors of a scale of all batches, in the order in which they are drawn."""
    counts = [batch.count(scale) for batch in batches]
    chosen = torch.randperm(sum(counts), generator=generator, device=generator.device)[:MAX_VECTORS]
    sampled, start = [], 0
    for batch, count in zip(batches, counts):
        places = ((chosen >= start) & (chosen < start + count)).nonzero().squeeze(1)
        sampled.append((places, batch.vectors(scale)[chosen[places] - start]))
        start += count
    places, vectors = (torch.cat(parts) for parts in zip(*sampled))
    return vectors[places.argsort()]


@without_autocast
@torch.no_grad()
def revive_dead_codes(model: NextFlowVQModel, pixel_values: torch.Tensor, dead: torch.Tensor, seed: int = 0) -> int:
    """Moves the codes marked in `dead` (V,) to vectors of the images (B, 3, H, W); returns how many were moved.

    Every process must pass the same `dead`; the vectors are those of the first process.
    """
    count = int(dead.sum())
    if count == 0:
        return 0
    generator = torch.Generator(pixel_values.device).manual_seed(seed)
    left, candidates = _Residuals(model, pixel_values), []
    for scale in range(left.schedule.num_scales):
        vectors = left.vectors(scale)
        # As many from each scale: fine scales have by far the most cells, coarse codes matter as much.
        candidates.append(_sample_vectors(vectors, min(len(vectors), count), generator))
        left.take(scale, model.quantizer.codebook)
    replacements = _sample_vectors(torch.cat(candidates), count, generator)
    if torch.distributed.is_initialized():
        replacements = _broadcast_from_first(replacements)
    _write(model, dead.nonzero().squeeze(1)[: len(replacements)], replacements)
    return len(replacements)


def _broadcast_from_first(vectors: torch.Tensor) -> torch.Tensor:
    """The vectors (n, D) of the first process, whose images may have another size and give another number of them."""
    count = torch.tensor(len(vectors), device=vectors.device)
    torch.distributed.broadcast(count, src=0)
    if torch.distributed.get_rank():
        vectors = vectors.new_empty(int(count), vectors.shape[1])
    torch.distributed.broadcast(vectors, src=0)
    return vectors


def _sample_vectors(vectors: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    return vectors[torch.randperm(len(vectors), generator=generator, device=vectors.device)[:count]]


def _nearest(model: NextFlowVQModel, vectors: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    indices = [model.quantizer.distances(chunk, centers).argmin(-1) for chunk in vectors.split(4096)]
    return centers[torch.cat(indices)]


def _kmeans(model: NextFlowVQModel, vectors: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm under the quantiser's own distance; empty clusters start anew from random vectors."""
    centers = _sample_vectors(vectors, count, generator).clone()
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
