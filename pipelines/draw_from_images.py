"""Draw from several images: a subject in another scene, or what an example pair shows done to a third image.

    python pipelines/draw_from_images.py "the same object on a black background" circle.png
    python pipelines/draw_from_images.py "do the same with the last picture" before.png after.png other.png

`transformers-nextflow edit --image … --image …` does the same with more options.
"""

import argparse

import torch

from transformers_nextflow import NextFlowPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("instruction")
    parser.add_argument("images", nargs="+", help="image files, in the order in which the instruction speaks of them")
    parser.add_argument("--output", default="drawn.png")
    parser.add_argument("--model", default="checkpoints/nextflow-shapes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = NextFlowPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    image = pipe(args.instruction, image=args.images, generator=torch.Generator().manual_seed(args.seed)).images[0]
    image.save(args.output)


if __name__ == "__main__":
    main()
