"""Compare interpolation as matrix products with torch's kernels: values, gradients, seconds, and codes that differ.

    OMP_NUM_THREADS=2 python benchmarks/resampling.py

The script measures forward and backward passes between each grid of the 256 level and its final grid, down by area and
up by each mode. Each time is the least of several turns in which the two ways alternate, since other processes can only
add time. The ratio is that of the sums for the modes of the paper's tokenizer (area down, bicubic up). The script then
measures training steps, without the optimizer, of a small convolutional tokenizer and of a transformer of the bundled
checkpoint's size on codes of the 256 level. Differences in value and gradient are those to torch's interpolation in
float64, relative to the largest number. Codes are compared on latents of random scenes from that tokenizer, with
codebooks that k-means makes from them.
Writes `results/resampling.json`: `largest_difference`, `speedup_forward_backward`, `codes_that_differ`.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from backbone import RESULTS, random_prompt
from measured_steps import (
    PATCH_SIZE,
    SIDES,
    least_seconds,
    make_model,
    make_tokenizer,
    tokenizer_step,
    transformer_step,
)
from tqdm import tqdm

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowVQModel
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.scale_schedule import Grid
from transformers_nextflow.trainers.tokenizer.codebook_maintenance import initialize_codebook
from transformers_nextflow.vision_tokenizer.resampling import resample
from transformers_nextflow.worlds.shapes.scene import World, random_scene
from transformers_nextflow.worlds.shapes.tokenizer_suite import pixels_of


MODES = (("area", "down"), ("bicubic", "up"), ("bilinear", "up"))
OF_THE_PAPER = (("area", "down"), ("bicubic", "up"))
CHANNELS = 40
TARGET_SPEEDUP, TARGET_DIFFERENCE = 1.5, 1e-6


def interpolate(features: torch.Tensor, grid: Grid, mode: str) -> torch.Tensor:
    """Does what `resample` does, with torch's kernels."""
    if tuple(features.shape[-2:]) == tuple(grid):
        return features
    align = {"align_corners": False} if mode in ("bicubic", "bilinear") else {}
    return F.interpolate(features, size=tuple(grid), mode=mode, **align)


@contextlib.contextmanager
def by_kernels():
    """Makes the whole package resample with torch's kernels."""
    names = ("vision_tokenizer.multiscale_quantizer", "modeling_nextflow", "modeling_nextflow_vq")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(patch(f"transformers_nextflow.{name}.resample", interpolate))
        yield


def grids_of(direction: str) -> list[tuple[Grid, Grid]]:
    final = (SIDES[-1], SIDES[-1])
    pairs = [((side, side), final) for side in SIDES[:-1]]
    return [(target, source) for source, target in pairs] if direction == "down" else pairs


def forward_backward(function: Callable, features: torch.Tensor, grid: Grid, mode: str) -> tuple[torch.Tensor, ...]:
    features = features.detach().requires_grad_()
    result = function(features, grid, mode)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result.device)
    return result.detach(), torch.autograd.grad(result, features, weights)[0]


def compare_grids(batch: int, repeats: int, device: str) -> tuple[dict, dict[str, float]]:
    """Returns seconds of each mode in both ways, summed over grids, and each way's largest difference to float64."""
    ways, seconds = {"matrices": resample, "kernels": interpolate}, {}
    largest = dict.fromkeys(ways, 0.0)
    for mode, direction in tqdm(MODES, unit="mode"):
        sums = dict.fromkeys(ways, 0.0)
        for source, target in grids_of(direction):
            features = torch.randn(batch, CHANNELS, *source, device=device)
            run = {name: partial(forward_backward, way, features, target, mode) for name, way in ways.items()}
            exact = forward_backward(interpolate, features.double(), target, mode)
            for name, way in run.items():
                for mine, other in zip(way(), exact):
                    difference = float((mine - other).abs().max() / other.abs().max())
                    largest[name] = max(largest[name], difference)
            for name, value in least_seconds(run, repeats, device).items():
                sums[name] += value
        seconds[f"{mode} {direction}"] = sums
    return seconds, largest


def scenes(count: int, device: str) -> torch.Tensor:
    world, rng = World(canvas=PATCH_SIZE * SIDES[-1], jitter=2), np.random.default_rng(0)
    return pixels_of([random_scene(rng, world) for _ in range(count)], world).to(device)


@torch.no_grad()
def codes_that_differ(tokenizer: NextFlowVQModel, images: int, device: str) -> dict:
    pixels = scenes(images, device)
    initialize_codebook(tokenizer, pixels[:256])
    found: dict[str, list[torch.Tensor]] = {"matrices": [], "kernels": []}
    schedule = tokenizer.schedule_of(pixels)
    for chunk in tqdm(pixels.split(50), unit="batch"):
        latents = tokenizer.encode_latents(chunk)
        found["matrices"].append(tokenizer.quantizer.encode(latents, schedule).image_tokens)
        with by_kernels():
            found["kernels"].append(tokenizer.quantizer.encode(latents, schedule).image_tokens)
    differ = torch.cat(found["matrices"]) != torch.cat(found["kernels"])
    return {
        "codes_that_differ": int(differ.sum()),
        "codes": differ.numel(),
        "images_that_differ": int(differ.any(1).sum()),
        "images": images,
    }


def transformer_batch(model: NextFlowForConditionalGeneration, count: int, device: str) -> dict:
    config = model.config
    schedule = config.vq_config.scale_schedules.build()
    ids = random_prompt(config, 16, device).expand(count, -1)
    slots = ids.new_full((count, schedule.num_slots(config.read_last_scale)), config.image_token_id)
    ids = torch.cat([ids, slots, ids.new_full((count, 1), config.eoi_token_id)], 1)
    codes = torch.randint(config.vq_config.codebook_size, (count, schedule.num_tokens), device=device)
    return {
        "input_ids": ids,
        "labels": ids,
        "image_tokens": codes,
        "image_grids": torch.tensor([schedule.final_grid] * count, device=device),
    }


def compare_steps(tokenizer: NextFlowVQModel, batch: int, repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Returns the seconds of a training step in both ways."""
    model = make_model().to(device).train()
    pixels, rows = scenes(batch, device), transformer_batch(model, batch, device)
    tokenizer.train().requires_grad_(True)
    steps = {
        "tokenizer": lambda: tokenizer_step(tokenizer, pixels),
        "transformer": lambda: transformer_step(model, rows),
    }

    def kernels(step):
        with by_kernels():
            step()

    return {
        name: least_seconds({"matrices": step, "kernels": lambda step=step: kernels(step)}, repeats, device)
        for name, step in tqdm(steps.items(), unit="model")
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15, help="number of turns; the fastest counts")
    parser.add_argument("--images", type=int, default=1000, help="number of images whose codes are compared")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()

    batch, repeats, device = arguments.batch, arguments.repeats, arguments.device
    seconds, largest = compare_grids(batch, repeats, device)
    tokenizer = make_tokenizer().to(device)
    differ = codes_that_differ(tokenizer, arguments.images, device)
    steps = compare_steps(tokenizer, batch, max(3, repeats // 3), device)

    names = [f"{mode} {direction}" for mode, direction in OF_THE_PAPER]
    of_paper = {way: sum(seconds[name][way] for name in names) for way in ("matrices", "kernels")}
    speedup = of_paper["kernels"] / of_paper["matrices"]
    for name, ways in (seconds | steps).items():
        ratio = ways["kernels"] / ways["matrices"]
        print(
            f"{name:<13} kernels {ways['kernels'] * 1e3:>8.1f} ms, matrices {ways['matrices'] * 1e3:>8.1f} ms: "
            f"{ratio:.2f} times as fast"
        )
    print(f"area down and bicubic up in sum: {speedup:.2f} times as fast (target {TARGET_SPEEDUP})")
    print(f"largest differences in value or gradient {largest} (target {TARGET_DIFFERENCE})")
    print(f"{differ['codes_that_differ']} of {differ['codes']} codes differ, in {differ['images_that_differ']} images")
    values = {
        "largest_difference": largest["matrices"],
        "largest_difference_of_kernels": largest["kernels"],
        "speedup_forward_backward": round(speedup, 2),
        **differ,
        "step_speedup": {name: round(ways["kernels"] / ways["matrices"], 3) for name, ways in steps.items()},
        "seconds": seconds | steps,
        "batch": batch,
    }
    print("written:", write_result(Path(arguments.results) / "resampling.json", values, device))


if __name__ == "__main__":
    main()
