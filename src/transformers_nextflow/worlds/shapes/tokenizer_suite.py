"""Scores of the tokenizer's reconstructions: the upper bound of all other scores, to check before a transformer is
trained.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ...evaluation.image_metrics import psnr, ssim, to_uint8
from ...modeling_nextflow_vq import NextFlowVQModel, codebook_statistics
from ...vision_tokenizer.resampling import resample
from .checker import read
from .scene import Scene, World, cell_labels, random_scene, render


SEED = 7_000_000  # no training scene has this seed
PROBE_STEPS = 300
PROBE_SCENES = 10_000
BATCH_SIZE = 250


def pixels_of(scenes: list[Scene], world: World) -> torch.Tensor:
    """Scenes as images (B, 3, H, W) in [-1, 1]."""
    images = np.stack([render(scene, world) for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def evaluate_tokenizer(model: NextFlowVQModel, world: World, count: int = 2000) -> dict[str, float]:
    """Scores of the tokenizer on `count` held-out scenes.

    `psnr`, `ssim`, `exact_scenes` (share of reconstructions that the checker reads exactly right),
    `exact_scenes_N_objects`, `linear_probe_shape` and `linear_probe_color` (accuracy at an object's place from the
    codes that the paper's layout reads, all scales but the last), `…_with_last_scale`, and codebook statistics.
    """
    scenes = [random_scene(np.random.default_rng((SEED, i)), world, allow_held_out=True) for i in range(count)]
    pixels = pixels_of(scenes, world).to(model.device)
    schedule = model.schedule_of(pixels)
    tokens = torch.cat([model.encode(chunk).image_tokens for chunk in pixels.split(BATCH_SIZE)])
    restored = torch.cat([model.decode(chunk, schedule) for chunk in tokens.split(BATCH_SIZE)])
    exact = np.array([read(image, world) == scene for image, scene in zip(to_uint8(restored), scenes)])
    sizes = np.array([len(scene.objects) for scene in scenes])
    result = {
        "psnr": float(psnr((restored + 1) / 2, (pixels + 1) / 2).mean()),
        "ssim": float(ssim((restored + 1) / 2, (pixels + 1) / 2).mean()),
        "exact_scenes": float(exact.mean()),
    }
    result |= {f"exact_scenes_{n}_objects": float(exact[sizes == n].mean()) for n in sorted(set(sizes.tolist()))}
    seeds = ((SEED + 1, i) for i in range(PROBE_SCENES))
    fitting = [random_scene(np.random.default_rng(seed), world, allow_held_out=True) for seed in seeds]
    batches = (pixels_of(fitting[i : i + BATCH_SIZE], world) for i in range(0, PROBE_SCENES, BATCH_SIZE))
    fitting_tokens = torch.cat([model.encode(batch.to(model.device)).image_tokens for batch in batches])
    for suffix, scales in (("", schedule.num_scales - 1), ("_with_last_scale", schedule.num_scales)):
        fitted_on, tested_on = (fitting, fitting_tokens), (scenes, tokens)
        for attribute, accuracy in linear_probe(model, world, scales, fitted_on, tested_on).items():
            result[f"linear_probe_{attribute}{suffix}"] = accuracy
    return result | codebook_statistics(tokens, schedule, model.config.codebook_size)


def linear_probe(
    model: NextFlowVQModel,
    world: World,
    num_scales: int,
    fitted_on: tuple[list[Scene], torch.Tensor],
    tested_on: tuple[list[Scene], torch.Tensor],
) -> dict[str, float]:
    """Accuracy with which a linear map predicts an object's shape and colour from the code vectors at its place.

    The map reads the vectors of the first `num_scales` scales side by side. It is fitted on some scenes, with their
    codes (n, N), and tested on others.
    """
    inputs, targets = _cells(model, world, num_scales, *fitted_on)
    test_inputs, test_targets = _cells(model, world, num_scales, *tested_on)
    scale = inputs.std(0).clamp_min(1e-6)
    accuracies = {}
    for attribute, classes in (("shape", len(world.shapes)), ("color", len(world.colors))):
        probe = torch.nn.Linear(inputs.shape[1], classes)
        torch.nn.init.zeros_(probe.weight)
        torch.nn.init.zeros_(probe.bias)
        optimizer = torch.optim.Adam(probe.parameters(), lr=0.03)
        with torch.enable_grad():
            for _ in range(PROBE_STEPS):
                loss = F.cross_entropy(probe(inputs / scale), targets[attribute])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        predicted = probe(test_inputs / scale).argmax(-1)
        accuracies[attribute] = float((predicted == test_targets[attribute]).float().mean())
    return accuracies


def _cells(model, world, num_scales, scenes, tokens):
    """Code vectors (n, C) at the places of all objects, and their attributes (n,) counted from 0."""
    grid = (world.lattice, world.lattice)
    schedule = model.config.scale_schedules.for_size(world.canvas, world.canvas)
    vectors = model.quantizer.lookup(tokens[:, : schedule.offsets[num_scales]], schedule)
    # A cell of the lattice may cover several cells of a fine grid, whose vectors are put side by side.
    features = torch.cat([_on_lattice(vector, grid, model.config.upsample) for vector in vectors], dim=1)
    features = features.permute(0, 2, 3, 1).cpu()
    labels = [cell_labels(scene, world) for scene in scenes]
    shapes = torch.from_numpy(np.stack([label.shapes for label in labels]))
    colors = torch.from_numpy(np.stack([label.colors for label in labels]))
    occupied = shapes > 0
    return features[occupied], {"shape": shapes[occupied] - 1, "color": colors[occupied] - 1}


def _on_lattice(vector: torch.Tensor, grid: tuple[int, int], upsample: str) -> torch.Tensor:
    # Coarse codes are read at a cell as the tokenizer and the transformer read them there.
    factor = vector.shape[-1] // grid[1]
    return F.pixel_unshuffle(vector, factor) if factor > 1 else resample(vector, grid, upsample)
