"""Render a size's images of one thing as files, on which a diffusion decoder is trained.

    python examples/emoji/make_images.py --size medium --side 128 --output runs/emoji/images-128

Each concept is rendered in each of its styles on each background, but for the held-out pairs of concept and style.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from sizes import SIZES, world_of
from tqdm import tqdm

from transformers_nextflow.worlds.emoji import Scene, Sticker, World, render
from transformers_nextflow.worlds.emoji.scene import BACKGROUNDS


def scenes_of(world: World) -> list[Scene]:
    """Returns the scenes that are rendered."""
    pairs = [pair for pair in world.pairs if not world.holds_out_style(*pair)]
    return [Scene((Sticker(*pair),), background) for pair in pairs for background in BACKGROUNDS]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--art", type=Path, default=Path("runs/emoji/art.zip"))
    parser.add_argument("--side", type=int, default=128, help="side of the square images in pixels")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    world = world_of(SIZES[arguments.size], arguments.art, arguments.side)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if any(arguments.output.iterdir()):
        raise ValueError(f"--output {arguments.output} is not empty; choose a new folder.")
    for number, scene in enumerate(tqdm(scenes_of(world), unit="image")):
        Image.fromarray(render(scene, world)).save(arguments.output / f"{number:06}.png")


if __name__ == "__main__":
    main()
