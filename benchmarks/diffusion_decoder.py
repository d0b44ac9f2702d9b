"""Compare a diffusion decoder with the pixel decoder on held-out images of the emoji world or the shapes world.

    OMP_NUM_THREADS=2 python benchmarks/diffusion_decoder.py --decoder FOLDER
    OMP_NUM_THREADS=2 python benchmarks/diffusion_decoder.py --world shapes --decoder FOLDER

The emoji are those pairs of concept and style, on each background, that the decoder's training left out; they need the
drawings and the medium judge (`examples/emoji/README.md`). The shapes are random scenes, some with pairs of shape and
colour that no training scene held. Scenes are rendered at the decoder's size and at the tokenizer's size. The smaller
rendering is encoded and then decoded by the pixel decoder (enlarged by bicubic interpolation) and by the diffusion
decoder. The scores of each are the share of images that the judge (for shapes, the exact checker) reads right, PSNR and
SSIM against the rendering, and sharpness, the energy of gradients relative to that of the rendering, where 1 is as
sharp. For edits, the script measures how far pixels outside of a mask are from the image's own, without pasting them
back. Writes `results/diffusion_decoder.json`, and `docs/diffusion_decoder.png` with the pixel decoder, the diffusion
decoder and the rendering; for shapes their names end in `_shapes`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.diffusion_decoder import DiffusionSettings, decode_codes
from transformers_nextflow.evaluation.image_metrics import contact_sheet, generator_of, psnr, ssim, to_uint8
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.vision_tokenizer.resampling import resample
from transformers_nextflow.worlds import emoji, shapes
from transformers_nextflow.worlds.emoji.judge import Judge
from transformers_nextflow.worlds.emoji.reading import reading_scores
from transformers_nextflow.worlds.emoji.scene import BACKGROUNDS
from transformers_nextflow.worlds.shapes.scene import random_scene
from transformers_nextflow.worlds.shapes.tokenizer_suite import SEED, pixels_of


ROOT = Path(__file__).parents[1]
ART, JUDGE = ROOT / "runs" / "emoji" / "art.zip", ROOT / "runs" / "emoji" / "medium" / "judge"
BATCH_SIZE = 25
SHEET_COLUMNS = 10


class Subject(ABC):
    """What is decoded: scenes of a world, at the tokenizer's size and at the decoder's.

    Args:
        count: number of scenes.
        upsampling: the decoder's size by the tokenizer's.
    """

    checkpoint: str
    suffix = ""
    scenes: list

    @abstractmethod
    def pixels(self, scenes: Sequence, large: bool) -> torch.Tensor:
        """Renders scenes to images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def judged_right(self, images: np.ndarray) -> float:
        """Returns the share of images (B, H, W, 3) of the scenes, of the decoder's size, that are read right."""

    @abstractmethod
    def edit(self, number: int) -> tuple:
        """Returns a scene, a mask of the tokenizer's size with 255 where it is drawn anew, and a prompt."""


class Shapes(Subject):
    checkpoint, suffix = "nextflow-shapes", "_shapes"

    def __init__(self, count: int, upsampling: int):
        self.small = shapes.World()
        self.large = shapes.World(canvas=upsampling * self.small.canvas)
        rngs = (np.random.default_rng((SEED, number)) for number in range(count))
        self.scenes = [random_scene(rng, self.small, allow_held_out=True) for rng in rngs]

    def pixels(self, scenes, large):
        return pixels_of(scenes, self.large if large else self.small)

    def judged_right(self, images):
        return float(np.mean([shapes.read(image, self.large) == scene for image, scene in zip(images, self.scenes)]))

    def edit(self, number):
        scene = random_scene(np.random.default_rng((SEED + 2, number)), self.small)
        row, column = scene.objects[0].cell
        mask, cell = np.zeros((self.small.canvas, self.small.canvas), np.uint8), self.small.cell_size
        mask[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 255
        return scene, mask, "a red circle"


class Emoji(Subject):
    checkpoint = "nextflow-emoji"

    def __init__(self, count: int, upsampling: int):
        self.judge = Judge.load(JUDGE)
        self.small = emoji.World.load(JUDGE / "world.json", emoji.Art(ART))
        self.large = replace(self.small, side=upsampling * self.small.side)
        held_out = [pair for pair in self.small.pairs if self.small.holds_out_style(*pair)]
        scenes = [emoji.Scene((emoji.Sticker(*pair),), color) for pair in held_out for color in BACKGROUNDS]
        self.scenes = [scenes[i] for i in np.random.default_rng(SEED).permutation(len(scenes))[:count]]

    def pixels(self, scenes, large):
        world = self.large if large else self.small
        images = torch.from_numpy(np.stack([emoji.render(scene, world) for scene in scenes]))
        return images.permute(0, 3, 1, 2) / 127.5 - 1

    def judged_right(self, images):
        return reading_scores(self.judge, list(images), self.scenes)["right"]

    def edit(self, number):
        """The upper left quarter of an image is drawn anew."""
        mask = np.zeros((self.small.side, self.small.side), np.uint8)
        mask[: self.small.side // 2, : self.small.side // 2] = 255
        scene = self.scenes[number]
        return scene, mask, self.small.name(scene.stickers[0].concept)


SUBJECTS = {"emoji": Emoji, "shapes": Shapes}


def gradient_energy(pixels: torch.Tensor) -> float:
    """Returns the mean squared difference of neighbouring pixels of images (B, 3, H, W)."""
    return float(pixels.diff(dim=-1).square().mean() + pixels.diff(dim=-2).square().mean())


def scores(pixels: torch.Tensor, originals: torch.Tensor, subject: Subject) -> dict[str, float]:
    """Scores images (B, 3, H, W) in [-1, 1] of the subject's scenes, of the decoder's size."""
    images, references = pixels / 2 + 0.5, originals / 2 + 0.5
    return {
        "judged_right": subject.judged_right(to_uint8(pixels)),
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
        decoded(pipe, tokens[[row % len(tokens)]], settings)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])  # the first run is a warm-up


def kept_outside(pipe, subject: Subject, count: int, steps: int) -> dict[str, float]:
    """Edits inside masks; returns each decoder's PSNR outside of them, against the rendering."""
    factor = pipe.diffusion_decoder.config.upsampling
    found: dict[str, list[float]] = {"pixel": [], "diffusion": []}
    for number in range(count):
        scene, mask, prompt = subject.edit(number)
        [original], [given] = subject.pixels([scene], large=True), to_uint8(subject.pixels([scene], large=False))
        outside = torch.from_numpy(mask == 0).repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        for decoder in found:
            options = {"decoder_steps": steps} if decoder == "diffusion" else {}
            image = pipe(
                prompt, image=Image.fromarray(given), mask_image=Image.fromarray(mask),
                generator=generator_of(1, number), decoder=decoder, output_type="pt", **options,
            ).images  # fmt: skip
            image = resample(image, original.shape[-2:], "bicubic")[0]
            pair = (own[:, outside][None, :, None] for own in (image, original / 2 + 0.5))
            found[decoder].append(float(psnr(*pair)))
    return {f"{decoder}_decoder": float(np.mean(values)) for decoder, values in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=SUBJECTS, default="emoji")
    parser.add_argument("--model", help="default: the bundled checkpoint of the world")
    parser.add_argument("--decoder", required=True, help="folder of a diffusion decoder for the model's tokenizer")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    kind = SUBJECTS[options.world]
    model = options.model or ROOT / "checkpoints" / kind.checkpoint
    pipe = NextFlowPipeline.from_pretrained(model, diffusion_decoder=options.decoder)
    pipe.set_progress_bar_config(disable=True)
    config, vq_model = pipe.diffusion_decoder.config, pipe.model.vq_model
    subject = kind(options.scenes, config.upsampling)
    originals, seen = (subject.pixels(subject.scenes, large) for large in (True, False))
    with torch.no_grad():
        tokens = vq_model.encode(seen).image_tokens
        plain = vq_model.decode(tokens, vq_model.schedule_of(seen))
    plain = resample(plain, originals.shape[-2:], "bicubic").clamp(-1, 1)
    values: dict = {
        "world": options.world, "scenes": len(subject.scenes), "size": originals.shape[-1],
        "upsampling": config.upsampling,
        "parameters": sum(p.numel() for p in pipe.diffusion_decoder.parameters()),
        "renderings": {"judged_right": subject.judged_right(to_uint8(originals))},
        "pixel_decoder": scores(plain, originals, subject), "diffusion_decoder": {},
    }  # fmt: skip
    best = None
    for steps in options.steps:
        settings = DiffusionSettings(steps, config.guidance_scale)
        pixels = decoded(pipe, tokens, settings)
        row = scores(pixels, originals, subject) | {"seconds": seconds_of_one(pipe, tokens, settings)}
        values["diffusion_decoder"][f"{steps}_steps"] = row
        print(steps, row, flush=True)
        if steps == config.num_inference_steps:
            best = pixels
    print("pixel", values["pixel_decoder"])
    if options.edits:
        values["psnr_outside_of_masks"] = kept_outside(pipe, subject, options.edits, config.num_inference_steps)
        print(values["psnr_outside_of_masks"])
    if best is not None:
        rows = (plain, best, originals)
        sheet = [[Image.fromarray(image) for image in to_uint8(row[:SHEET_COLUMNS])] for row in rows]
        options.figures.mkdir(parents=True, exist_ok=True)
        contact_sheet(sheet).save(options.figures / f"diffusion_decoder{kind.suffix}.png")
    print("written:", write_result(options.results / f"diffusion_decoder{kind.suffix}.json", values))


if __name__ == "__main__":
    main()
