"""Compare a diffusion decoder with the pixel decoder on held-out images of the shapes world.

    OMP_NUM_THREADS=2 python benchmarks/diffusion_decoder.py --decoder FOLDER

Scenes, some with pairs of shape and colour that no training scene held, are rendered at the decoder's size and at the
tokenizer's size. The smaller rendering is encoded and then decoded by the pixel decoder (enlarged by bicubic
interpolation) and by the diffusion decoder. The scores of each are the share of images that the checker reads exactly
right (the judge), PSNR and SSIM against the rendering, and sharpness, the energy of gradients relative to that of the
rendering, where 1 is as sharp. For edits, the script measures how far pixels outside of a mask are from the image's
own, without pasting them back. Writes `results/diffusion_decoder.json`, and `docs/diffusion_decoder.png` with the pixel
decoder, the diffusion decoder and the rendering.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.diffusion_decoder import DiffusionSettings, decode_codes
from transformers_nextflow.evaluation.image_metrics import contact_sheet, generator_of, psnr, ssim, to_uint8
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.vision_tokenizer.resampling import resample
from transformers_nextflow.worlds.shapes.checker import read
from transformers_nextflow.worlds.shapes.scene import Scene, World, random_scene
from transformers_nextflow.worlds.shapes.tokenizer_suite import SEED, pixels_of


ROOT = Path(__file__).parents[1]
BATCH_SIZE = 25
SHEET_COLUMNS = 10


def gradient_energy(pixels: torch.Tensor) -> float:
    """Returns the mean squared difference of neighbouring pixels of images (B, 3, H, W)."""
    return float(pixels.diff(dim=-1).square().mean() + pixels.diff(dim=-2).square().mean())


def scores(pixels: torch.Tensor, originals: torch.Tensor, scenes: list[Scene], world: World) -> dict[str, float]:
    """Scores images (B, 3, H, W) in [-1, 1] of the world's size."""
    exact = [read(image, world) == scene for image, scene in zip(to_uint8(pixels), scenes)]
    images, references = pixels / 2 + 0.5, originals / 2 + 0.5
    return {
        "judged_right": float(np.mean(exact)),
        "psnr": float(psnr(images, references).mean()),
        "ssim": float(ssim(images, references).mean()),
        "sharpness": gradient_energy(pixels) / gradient_energy(originals),
    }


def decoded(pipe, tokens: torch.Tensor, settings: DiffusionSettings) -> torch.Tensor:
    """Decodes codes of one size to images (B, 3, H, W); each image has its own noise."""
    schedule = pipe.model.config.vq_config.scale_schedules.build()
    images = []
    for start in range(0, len(tokens), BATCH_SIZE):
        rows = tokens[start : start + BATCH_SIZE]
        noise = [generator_of(0, start + row) for row in range(len(rows))]
        images += decode_codes(
            pipe.diffusion_decoder, pipe.model.vq_model, rows, [schedule] * len(rows), settings, noise
        )
    return torch.stack(images)


def seconds_of_one(pipe, tokens: torch.Tensor, settings: DiffusionSettings, repeats: int = 5) -> float:
    """Returns the median seconds for a batch of one image."""
    taken = []
    for row in range(repeats + 1):
        start = time.perf_counter()
        decoded(pipe, tokens[[row]], settings)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])  # the first run is a warm-up


def kept_outside(pipe, count: int, steps: int) -> dict[str, float]:
    """Edits inside a mask around one object; returns each decoder's PSNR outside of it, against the rendering."""
    small, factor = World(), pipe.diffusion_decoder.config.upsampling
    large = World(canvas=factor * small.canvas)
    found: dict[str, list[float]] = {"pixel": [], "diffusion": []}
    for number in range(count):
        scene = random_scene(np.random.default_rng((SEED + 2, number)), small)
        [original] = pixels_of([scene], large)
        row, column = scene.objects[0].cell
        mask, cell = np.zeros((small.canvas, small.canvas), np.uint8), small.cell_size
        mask[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 255
        outside = torch.from_numpy(mask == 0).repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        for decoder in found:
            options = {"decoder_steps": steps} if decoder == "diffusion" else {}
            image = pipe(
                "a red circle", image=Image.fromarray(to_uint8(pixels_of([scene], small))[0]),
                mask_image=Image.fromarray(mask), generator=generator_of(1, number), decoder=decoder, output_type="pt",
                **options,
            ).images  # fmt: skip
            image = resample(image, (large.canvas, large.canvas), "bicubic")[0]
            pair = (own[:, outside][None, :, None] for own in (image, original / 2 + 0.5))
            found[decoder].append(float(psnr(*pair)))
    return {f"{decoder}_decoder": float(np.mean(values)) for decoder, values in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT / "checkpoints" / "nextflow-shapes")
    parser.add_argument("--decoder", required=True, help="folder of a diffusion decoder for the model's tokenizer")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    pipe = NextFlowPipeline.from_pretrained(options.model, diffusion_decoder=options.decoder)
    pipe.set_progress_bar_config(disable=True)
    config, vq_model = pipe.diffusion_decoder.config, pipe.model.vq_model
    small, large = World(), World(canvas=config.upsampling * World().canvas)
    rngs = (np.random.default_rng((SEED, number)) for number in range(options.scenes))
    scenes = [random_scene(rng, small, allow_held_out=True) for rng in rngs]
    with torch.no_grad():
        originals, seen = pixels_of(scenes, large), pixels_of(scenes, small)
        tokens = vq_model.encode(seen).image_tokens
        plain = vq_model.decode(tokens, vq_model.schedule_of(seen))
    plain = resample(plain, (large.canvas, large.canvas), "bicubic").clamp(-1, 1)
    values: dict = {
        "scenes": options.scenes, "size": large.canvas, "upsampling": config.upsampling,
        "parameters": sum(p.numel() for p in pipe.diffusion_decoder.parameters()),
        "pixel_decoder": scores(plain, originals, scenes, large), "diffusion_decoder": {},
    }  # fmt: skip
    best = None
    for steps in options.steps:
        settings = DiffusionSettings(steps, config.guidance_scale)
        pixels = decoded(pipe, tokens, settings)
        row = scores(pixels, originals, scenes, large) | {"seconds": seconds_of_one(pipe, tokens, settings)}
        values["diffusion_decoder"][f"{steps}_steps"] = row
        print(steps, row, flush=True)
        if steps == config.num_inference_steps:
            best = pixels
    print("pixel", values["pixel_decoder"])
    if options.edits:
        values["psnr_outside_of_masks"] = kept_outside(pipe, options.edits, config.num_inference_steps)
        print(values["psnr_outside_of_masks"])
    if best is not None:
        rows = (plain, best, originals)
        sheet = [[Image.fromarray(image) for image in to_uint8(row[:SHEET_COLUMNS])] for row in rows]
        contact_sheet(sheet).save(options.figures / "diffusion_decoder.png")
    print("written:", write_result(options.results / "diffusion_decoder.json", values))


if __name__ == "__main__":
    main()
