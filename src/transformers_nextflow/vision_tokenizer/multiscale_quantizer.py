"""Multi-scale residual quantisation with two codebooks that share one index (paper, section 2.1; TokenFlow)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from ..configuration_nextflow import NextFlowVQConfig
from ..scale_schedule import Grid, ScaleSchedule
from ..utils.offloading import onload_weights
from .resampling import resample


# Rows of the distance matrix in memory at once: 4,096 x 32,768 float32 are 512 MiB, the largest grid of the 1024 level.
DISTANCE_ROWS = 4096


@dataclass(frozen=True)
class SelfCorrection:
    """Sampling of input codes near the nearest ones, so that a model learns to correct its own errors (paper, 3.1).

    Args:
        top_k: a code is sampled among this many nearest ones.
        token_share: share of the tokens of each scale that are sampled; the others keep the nearest code.
        temperature: temperature of the softmax over negative distances with which codes are sampled.
    """

    top_k: int = 10
    token_share: float = 0.6
    temperature: float = 1.0

    def __post_init__(self):
        if self.top_k < 1 or not 0 <= self.token_share <= 1 or self.temperature <= 0:
            raise ValueError(
                f"SelfCorrection takes top_k >= 1, token_share in [0, 1] and temperature > 0, got top_k={self.top_k}, "
                f"token_share={self.token_share}, temperature={self.temperature}."
            )


@dataclass
class QuantizerOutput:
    """Codes of a batch, (B, N) each, and outputs that training needs.

    `image_tokens` are the codes whose vectors were summed, `image_labels` the nearest ones; they differ only under
    self-correction. `features` (B, C, h, w) is the sum with a straight-through gradient; the losses are scalars.
    """

    image_tokens: torch.Tensor
    image_labels: torch.Tensor
    features: torch.Tensor
    codebook_loss: torch.Tensor
    commitment_loss: torch.Tensor


def without_autocast(method: Callable) -> Callable:
    """A method that computes in the precision of its tensors, also under autocast."""

    @wraps(method)
    def exact(self, *args, **kwargs):
        # Where no tensor is given, it is that of a model.
        place = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), self)
        with maybe_autocast(place.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return exact


def check_float32(module: nn.Module):
    """Raises `ValueError` unless the module's weights are float32 and whole: other ones give other codes."""
    for name, weight in module.named_parameters():
        # Sharded and quantised weights have classes of their own.
        is_whole = type(weight) in (nn.Parameter, torch.Tensor)
        if weight.dtype != torch.float32 or not is_whole:
            kind = weight.dtype if is_whole else f"a {type(weight).__name__} of {weight.dtype}"
            raise ValueError(
                f"{type(module).__name__}.{name} is {kind}, but codes are made in float32 from whole weights; "
                "load the vision tokenizer again, and leave it out of sharding, quantisation and casts of its parts."
            )


class NextFlowVQQuantizer(nn.Module):
    """Turns latents (B, C, h, w), the semantic channels first, into codes and back; always in float32."""

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        self.config = config
        self.semantic_codebook = nn.Embedding(config.codebook_size, config.semantic_code_dim)
        self.pixel_codebook = nn.Embedding(config.codebook_size, config.pixel_code_dim)

    @property
    def codebook(self) -> torch.Tensor:
        """The vectors (V, C) of the codes: both halves side by side, each of unit length with `normalize_codes`.

        Raises:
            ValueError: for codebooks that are not float32, or sharded.
        """
        check_float32(self)
        with onload_weights(self.modules()):
            vectors = torch.cat([self.semantic_codebook.weight, self.pixel_codebook.weight], dim=-1)
        return self.normalize(vectors) if self.config.normalize_codes else vectors

    def normalize(self, vectors: torch.Tensor) -> torch.Tensor:
        """Normalise both halves of (..., C) to unit length."""
        halves = vectors.split([self.config.semantic_code_dim, self.config.pixel_code_dim], dim=-1)
        return torch.cat([F.normalize(half, dim=-1) for half in halves], dim=-1)

    @without_autocast
    def encode(
        self,
        latents: torch.Tensor,
        schedule: ScaleSchedule,
        self_correction: SelfCorrection | None = None,
        num_scales: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> QuantizerOutput:
        """Quantise latents (B, C, h, w) scale by scale, each scale the residual of those before.

        Args:
            latents: on the schedule's final grid.
            self_correction: sample a part of the codes among the nearest ones; the residual continues from these.
            num_scales: (B,) how many of its first scales are summed for each image (training drops the others).
            generator: source of the random numbers.
        """
        latents = latents.float()
        codebook = self.codebook
        residual, total = latents, torch.zeros_like(latents)
        tokens, labels, codebook_loss, commitment_loss = [], [], 0.0, 0.0
        for scale, grid in enumerate(schedule.grids):
            target, compared = self.targets(residual, grid)
            sampled, nearest = self._pick(compared.flatten(0, 2), codebook, self_correction, generator)
            sampled, nearest = sampled.view(target.shape[:-1]), nearest.view(target.shape[:-1])
            vectors = F.embedding(sampled, codebook)
            codebook_loss = codebook_loss + F.mse_loss(vectors, compared.detach())
            commitment_loss = commitment_loss + F.mse_loss(compared, vectors.detach())

            # Each scale has its own straight-through gradient, so that a sum over the first scales has the gradient of
            # the same sum without quantisation, and not that of the full latents.
            contribution = (target + (vectors - target).detach()).permute(0, 3, 1, 2)
            contribution = resample(contribution, schedule.final_grid, self.config.upsample)
            residual = residual - contribution
            if num_scales is not None:
                contribution = contribution * (num_scales > scale).view(-1, 1, 1, 1)
            total = total + contribution
            tokens.append(sampled.flatten(1))
            labels.append(nearest.flatten(1))
        return QuantizerOutput(
            image_tokens=torch.cat(tokens, dim=1),
            image_labels=torch.cat(labels, dim=1),
            features=total,
            codebook_loss=codebook_loss / schedule.num_scales,
            commitment_loss=commitment_loss / schedule.num_scales,
        )

    @without_autocast
    def targets(self, residual: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """A residual (B, C, h, w), downsampled to the grid (h_k, w_k) of a scale: vectors (B, h_k, w_k, C), and these
        vectors normalised as for the comparison with the codes.
        """
        target = resample(residual, grid, self.config.downsample).permute(0, 2, 3, 1)
        return target, self.normalize(target) if self.config.normalize_codes else target

    def nearest(self, residual: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest codes (B, h_k * w_k) of a residual (B, C, h, w) on a grid."""
        compared = self.targets(residual.float(), grid)[1]
        return self._pick(compared.flatten(0, 2), self.codebook, None, None)[0].view(len(residual), -1)

    @without_autocast
    def truncate(self, latents: torch.Tensor, schedule: ScaleSchedule, num_scales: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) reduced to the first `num_scales` (B,) scales of each image, without quantisation."""
        residual, total = latents, torch.zeros_like(latents)
        for scale, grid in enumerate(schedule.grids):
            contribution = resample(residual, grid, self.config.downsample)
            contribution = resample(contribution, schedule.final_grid, self.config.upsample)
            residual = residual - contribution
            total = total + contribution * (num_scales > scale).view(-1, 1, 1, 1)
        return total

    def lookup(self, image_tokens: torch.Tensor, schedule: ScaleSchedule) -> list[torch.Tensor]:
        """The vectors (B, C, h_k, w_k) of each scale that the codes (B, n) cover.

        Raises:
            ValueError: if the codes do not fill whole scales or lie outside the codebook.
        """
        codebook = self.codebook
        grids = schedule.split(image_tokens.to(codebook.device))
        if image_tokens.numel() and not 0 <= int(image_tokens.min()) <= int(image_tokens.max()) < len(codebook):
            raise ValueError(
                f"Codes run from 0 to {len(codebook) - 1}, got {int(image_tokens.min())} to "
                f"{int(image_tokens.max())}; are they from another tokenizer?"
            )
        return [F.embedding(codes, codebook).permute(0, 3, 1, 2) for codes in grids]

    def decode(self, image_tokens: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
        """The sum (B, C, h, w) on the final grid of the codes (B, n) of all scales, or of the first ones."""
        vectors = self.lookup(image_tokens, schedule)
        return sum(resample(vector, schedule.final_grid, self.config.upsample) for vector in vectors)

    def _pick(
        self,
        vectors: torch.Tensor,
        codebook: torch.Tensor,
        self_correction: SelfCorrection | None,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (n,) for vectors (n, C), sampled under self-correction, and the nearest codes (n,)."""
        chunks = (self.distances(chunk, codebook) for chunk in vectors.split(DISTANCE_ROWS))
        if self_correction is None:
            nearest = torch.cat([chunk.argmin(-1) for chunk in chunks])
            return nearest, nearest
        k = min(self_correction.top_k, len(codebook))
        picks = [chunk.topk(k, largest=False) for chunk in chunks]
        distances, candidates = (torch.cat(parts) for parts in zip(*picks))
        nearest = candidates[:, 0]
        probabilities = (-distances / self_correction.temperature).softmax(-1)
        choice = torch.multinomial(probabilities, 1, generator=generator)
        sampled = candidates.gather(1, choice).squeeze(1)
        replaced = torch.rand(len(vectors), generator=generator, device=vectors.device) < self_correction.token_share
        return torch.where(replaced, sampled, nearest), nearest

    @property
    def distance_weights(self) -> torch.Tensor:
        """The weight (C,) of each channel's squared difference in a distance, on the CPU."""
        config = self.config
        weights = [config.semantic_distance_weight] * config.semantic_code_dim
        weights += [config.pixel_distance_weight] * config.pixel_code_dim
        return torch.tensor(weights)

    @without_autocast
    @torch.no_grad()
    def distances(self, vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        """The weighted sum (n, V) of the two squared distances, without the vectors' own norms, the same for all
        codes.
        """
        weighted = codebook * self.distance_weights.to(codebook.device)
        return torch.addmm((weighted * codebook).sum(-1), vectors, weighted.T, alpha=-2)
