"""Render a size's images of one thing as files, on which a diffusion decoder is trained.

    python examples/emoji/make_images.py --size medium --side 128 --output runs/emoji/images-128

Each concept is rendered in each of its styles on each background, but for the held-out pairs of concept and style. With
`--others`, drawings of the size's styles that show other concepts are rendered too, each on one background: a decoder
that sees many drawings learns what codes look like rather than what drawings there are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sizes import KEPT_CONCEPT, SIZES, world_of
from tqdm import tqdm

from transformers_nextflow.worlds.emoji import Scene, Sticker, World, render
from transformers_nextflow.worlds.emoji.scene import BACKGROUNDS


def scenes_of(world: World) -> list[Scene]:
    """Returns the scenes that are rendered."""
    pairs = [pair for pair in world.pairs if not world.holds_out_style(*pair)]
    return [Scene((Sticker(*pair),), background) for pair in pairs for background in BACKGROUNDS]


def other_scenes(world: World, count: int) -> list[Scene]:
    """Returns scenes with drawings in the world's styles of concepts that it does not have, chosen by chance.

    Raises:
        ValueError: for more than there are.
    """
    known, art = {*world.concepts}, world.art
    others = [key for key, concept in art.concepts.items() if key not in known and concept.name != KEPT_CONCEPT]
    pairs = [(key, style) for key in others for style in world.styles if (key, style) in art.drawings]
    if not 0 <= count <= len(pairs):
        raise ValueError(f"--others must be 0 to {len(pairs)}, the number of other drawings, got {count}.")
    rng = np.random.default_rng(0)
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:count]]
    return [Scene((Sticker(*pair),), str(rng.choice([*BACKGROUNDS]))) for pair in chosen]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--art", type=Path, default=Path("runs/emoji/art.zip"))
    parser.add_argument("--side", type=int, default=128, help="side of the square images in pixels")
    parser.add_argument("--others", type=int, default=0, help="number of images with drawings of other concepts")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    world = world_of(SIZES[arguments.size], arguments.art, arguments.side)
    scenes = scenes_of(world) + other_scenes(world, arguments.others)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if any(arguments.output.iterdir()):
        raise ValueError(f"--output {arguments.output} is not empty; choose a new folder.")
    for number, scene in enumerate(tqdm(scenes, unit="image")):
        Image.fromarray(render(scene, world)).save(arguments.output / f"{number:06}.png")


if __name__ == "__main__":
    main()
