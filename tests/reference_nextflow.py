"""A second, slow NextFlow, written from the paper's text alone with loops over positions.

It shares no code with the package: what the fast paths compute is compared with what stands here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class ReferenceImage:
    """An image in a row of the sequence: its grids (height, width), coarse to fine, and the codes of all of them.

    `targets` are the codes to predict where they differ from those that are read (self-correction).
    """

    grids: list[tuple[int, int]]
    codes: list[int]
    targets: list[int] | None = None

    def grid_codes(self, k: int) -> list[list[int]]:
        """The codes of the k-th grid, k from 1, as rows."""
        start = sum(height * width for height, width in self.grids[: k - 1])
        height, width = self.grids[k - 1]
        return [self.codes[start + i * width : start + (i + 1) * width] for i in range(height)]


@dataclass
class Position:
    """One position of the sequence. Text has `token`; the others have an image, slots a scale and a cell too."""

    kind: str  # "pad", "text", "boi", "slot" or "eoi"
    token: int
    image: ReferenceImage | None = None
    scale: int = 0  # k of the grid that the slot stands for, K + 1 for the one that reads the last grid
    cell: tuple[int, int] = (0, 0)

    @property
    def grid(self) -> tuple[int, int]:
        return self.image.grids[min(self.scale, len(self.image.grids)) - 1]


def lay_out(
    row: list[int | ReferenceImage],
    boi: int,
    eoi: int,
    placeholder: int,
    read_last_scale: bool = False,
    left_padding: int = 0,
) -> list[Position]:
    """Figure 5: text one by one, an image as `<boi>`, the grids 2 … K (and once more the last one), `<eoi>`."""
    positions = [Position("pad", 0) for _ in range(left_padding)]
    for item in row:
        if not isinstance(item, ReferenceImage):
            positions.append(Position("text", item))
            continue
        positions.append(Position("boi", boi, item))
        scales = list(range(2, len(item.grids) + 1))
        if read_last_scale:
            scales.append(len(item.grids) + 1)
        for scale in scales:
            height, width = item.grids[min(scale, len(item.grids)) - 1]
            for i in range(height):
                for j in range(width):
                    positions.append(Position("slot", placeholder, item, scale, (i, j)))
        positions.append(Position("eoi", eoi, item))
    return positions


def attention_mask(positions: list[Position]) -> torch.Tensor:
    """(L, L) bool, True where the row's position sees the column's: causal, and both ways within a grid."""
    mask = torch.zeros(len(positions), len(positions), dtype=torch.bool)
    for q, query in enumerate(positions):
        for k, key in enumerate(positions):
            same_grid = (
                query.kind == "slot" and key.kind == "slot" and query.image is key.image and query.scale == key.scale
            )
            mask[q, k] = key.kind != "pad" and (k <= q or same_grid)
    return mask


def rope_positions(positions: list[Position], rope_range: float) -> torch.Tensor:
    """(3, L) coordinates x, y, s: (t, t, t) for text, (C/sqrt(HW)·(i+½), C/sqrt(HW)·(j+½), s) for a cell (i, j).

    The third coordinate runs on: `<boi>` at t, the grid of scale k at t + k - 1, `<eoi>` one after the last grid.
    """
    coordinates = []
    t = 0
    for n, position in enumerate(positions):
        if position.kind == "pad":
            coordinates.append((0.0, 0.0, 0.0))
        elif position.kind == "slot":
            (height, width), (i, j) = position.grid, position.cell
            step = rope_range / math.sqrt(height * width)
            coordinates.append((step * (i + 0.5), step * (j + 0.5), float(t)))
            following = positions[n + 1]
            if following.kind != "slot" or following.scale != position.scale:
                t += 1
        else:
            coordinates.append((float(t), float(t), float(t)))
            t += 1
    return torch.tensor(coordinates).T


def input_features(
    positions: list[Position], codebook: torch.Tensor, upsample: str = "nearest", accumulate: bool = False, **how
) -> torch.Tensor:
    """(L, D) what each slot reads: the vectors of the grid before, brought up to the slot's grid; zeros elsewhere.

    With `accumulate` it is VAR's feature: all grids before, each brought up to the last grid, added up there, and the
    sum brought to the slot's grid with `how["downsample"]`.
    """
    features = torch.zeros(len(positions), codebook.shape[1])
    for n, position in enumerate(positions):
        if position.kind != "slot":
            continue
        image, (height, width), (i, j) = position.image, position.grid, position.cell
        if accumulate:
            final = image.grids[-1]
            total = sum(resize(grid_vectors(image, k, codebook), final, upsample) for k in range(1, position.scale))
            read = resize(total, (height, width), how["downsample"])
        else:
            read = resize(grid_vectors(image, position.scale - 1, codebook), (height, width), upsample)
        features[n] = read[0, :, i, j]
    return features


def scale_rows(rows: list[list[Position]], most_scales: int) -> list[int]:
    """Which row of the learned table of scales each slot adds: k if it predicts grid k, and the row behind those of all
    `most_scales` grids if it reads a last grid, of whatever level.
    """
    found = []
    for position in (position for row in rows for position in row if position.kind == "slot"):
        reads_last = position.scale > len(position.image.grids)
        found.append(most_scales + 1 if reads_last else position.scale)
    return found


def grid_vectors(image: ReferenceImage, k: int, codebook: torch.Tensor) -> torch.Tensor:
    """(1, D, h_k, w_k) vectors of the k-th grid's codes."""
    rows = [torch.stack([codebook[code] for code in row], dim=1) for row in image.grid_codes(k)]
    return torch.stack(rows, dim=1)[None]


def resize(image: torch.Tensor, grid: tuple[int, int], mode: str) -> torch.Tensor:
    if tuple(image.shape[-2:]) == tuple(grid):
        return image
    return F.interpolate(image, size=tuple(grid), mode=mode)


def code_targets(positions: list[Position]) -> list[tuple[int, int, tuple[int, int], ReferenceImage]]:
    """(position, code, grid, image) for every code: `<boi>` predicts the 1x1 grid, slots of grid k that grid."""
    found = []
    for n, position in enumerate(positions):
        if position.kind == "boi" or (position.kind == "slot" and position.scale <= len(position.image.grids)):
            image = position.image
            scale = 1 if position.kind == "boi" else position.scale
            height, width = image.grids[scale - 1]
            start = sum(h * w for h, w in image.grids[: scale - 1])
            i, j = position.cell
            targets = image.targets if image.targets is not None else image.codes
            found.append((n, targets[start + i * width + j], (height, width), image))
    return found


def scale_weights(grids: list[tuple[int, int]], alpha: float) -> list[float]:
    """Weight of a token of each grid, (h·w)^-alpha, scaled so that all tokens of the image weigh 1 on average."""
    raw = [(height * width) ** -alpha for height, width in grids]
    total = sum(height * width * weight for (height, width), weight in zip(grids, raw))
    count = sum(height * width for height, width in grids)
    return [weight * count / total for weight in raw]


def losses(
    logits: torch.Tensor, rows: list[list[Position]], labels: torch.Tensor, vocab_size: int, alpha: float
) -> tuple[list[float], list[tuple[float, float, int]]]:
    """All cross-entropies, one by one, from logits (B, L, text + codes) over one softmax.

    Returns the losses of text tokens and, of the codes, (loss, weight, number of the scale from 0). An image counts
    if its `<eoi>` has a label; placeholders and `<eoi>` themselves are predicted by nobody, nor is a first token.
    """
    text, codes = [], []
    for b, positions in enumerate(rows):
        for n in range(1, len(positions)):
            if positions[n].kind in ("text", "boi") and int(labels[b, n]) != -100:
                before = [m for m in range(n) if positions[m].kind != "pad"]
                if before:
                    text.append(cross_entropy(logits[b, before[-1]], int(labels[b, n])))
        trained = [p.image for n, p in enumerate(positions) if p.kind == "eoi" and int(labels[b, n]) != -100]
        for n, code, grid, image in code_targets(positions):
            if any(image is other for other in trained):
                scale = 0 if positions[n].kind == "boi" else positions[n].scale - 1
                weight = scale_weights(image.grids, alpha)[scale]
                assert grid == image.grids[scale]
                codes.append((cross_entropy(logits[b, n], vocab_size + code), weight, scale))
    return text, codes


def cross_entropy(logits: torch.Tensor, label: int) -> float:
    logits = logits.double()
    return float(torch.log(torch.exp(logits - logits.max()).sum()) + logits.max() - logits[label])


def quantize(
    latents: torch.Tensor,
    grids: list[tuple[int, int]],
    semantic_codebook: torch.Tensor,
    pixel_codebook: torch.Tensor,
    weights: tuple[float, float] = (1.0, 1.0),
    normalize: bool = False,
    downsample: str = "area",
    upsample: str = "bicubic",
    drawn: list[int] | None = None,
) -> tuple[list[int], torch.Tensor]:
    """Multi-scale residual quantisation of one image's latents (C, h, w), the semantic channels first.

    Each scale: the residual brought down, the index with the smallest weighted sum of both squared distances (between
    halves of unit length with `normalize`), its vectors brought up again and subtracted. With `drawn` the residual goes
    on from those codes. Returns the nearest codes and the sum (C, h, w) of what was subtracted.
    """

    def unit(vector):
        return vector / vector.norm() if normalize else vector

    split = semantic_codebook.shape[1]
    residual, total = latents[None].clone(), torch.zeros_like(latents)[None]
    nearest = []
    for height, width in grids:
        small = resize(residual, (height, width), downsample)
        vectors = torch.zeros_like(small)
        for i in range(height):
            for j in range(width):
                semantic, pixel = unit(small[0, :split, i, j]), unit(small[0, split:, i, j])
                distances = []
                for a, b in zip(semantic_codebook, pixel_codebook):
                    semantic_distance = ((semantic - unit(a)) ** 2).sum()
                    pixel_distance = ((pixel - unit(b)) ** 2).sum()
                    distances.append(float(weights[0] * semantic_distance + weights[1] * pixel_distance))
                nearest.append(distances.index(min(distances)))
                code = nearest[-1] if drawn is None else drawn[len(nearest) - 1]
                vectors[0, :, i, j] = torch.cat([unit(semantic_codebook[code]), unit(pixel_codebook[code])])
        contribution = resize(vectors, tuple(latents.shape[-2:]), upsample)
        residual = residual - contribution
        total = total + contribution
    return nearest, total[0]


def filtered_probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> list[float]:
    """Probabilities of one position after temperature, then the k likeliest, then the likeliest p of these."""
    scaled = [value / temperature for value in logits.double().tolist()]
    order = sorted(range(len(scaled)), key=lambda n: -scaled[n])
    order = order[: len(order) if top_k is None else top_k]
    weights = [math.exp(scaled[n] - scaled[order[0]]) for n in order]
    total, reached, kept = sum(weights), 0.0, []
    for n, weight in zip(order, weights):
        if reached >= top_p and kept:
            break
        kept.append((n, weight))
        reached += weight / total
    total = sum(weight for _, weight in kept)
    probabilities = [0.0] * len(scaled)
    for n, weight in kept:
        probabilities[n] = weight / total
    return probabilities


def as_batch(
    rows: list[list[int | ReferenceImage]], boi: int, eoi: int, placeholder: int, read_last_scale: bool = False
) -> tuple[list[list[Position]], dict[str, torch.Tensor]]:
    """Rows of different length, padded on the left: their positions, and what a model is given of them."""
    lengths = [len(lay_out(row, boi, eoi, placeholder, read_last_scale)) for row in rows]
    padding = [max(lengths) - length for length in lengths]
    laid_out = [lay_out(row, boi, eoi, placeholder, read_last_scale, pad) for row, pad in zip(rows, padding)]
    inputs = {
        "input_ids": torch.tensor([[position.token for position in row] for row in laid_out]),
        "attention_mask": torch.tensor([[int(position.kind != "pad") for position in row] for row in laid_out]),
    }
    images = [item for row in rows for item in row if isinstance(item, ReferenceImage)]
    if images:
        longest = max(len(image.codes) for image in images)
        inputs["image_tokens"] = torch.tensor([p.codes + [-1] * (longest - len(p.codes)) for p in images])
        inputs["image_grids"] = torch.tensor([image.grids[-1] for image in images])
    return laid_out, inputs
