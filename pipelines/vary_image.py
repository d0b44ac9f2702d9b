"""Draw variations of an image: its first scales are kept, the others drawn anew.

    python pipelines/vary_image.py "a rocket, 3d style" image.png --keep-scales 1

`transformers-nextflow vary` does the same with more options.
"""

import argparse
from pathlib import Path

import torch

from transformers_nextflow import NextFlowPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="what the image shows")
    parser.add_argument("image", help="an image file")
    parser.add_argument("--keep-scales", type=int, default=1, help="fewer vary more")
    parser.add_argument("--temperature", type=float, help="default: the checkpoint's own")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("variation.png"))
    parser.add_argument("--model", default="checkpoints/nextflow-emoji")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = NextFlowPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    images = pipe(
        args.prompt,
        image=args.image,
        num_kept_scales=args.keep_scales,
        temperature=args.temperature,
        num_images_per_prompt=args.count,
        generator=[torch.Generator().manual_seed(args.seed + number) for number in range(args.count)],
    ).images
    for number, image in enumerate(images):
        image.save(args.output.with_stem(f"{args.output.stem}-{number}"))


if __name__ == "__main__":
    main()
