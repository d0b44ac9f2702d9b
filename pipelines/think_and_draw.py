"""Write a thought first, and draw from it.

    python pipelines/think_and_draw.py "the shape with three sides in the color of grass"

`transformers-nextflow generate --think` does the same with more options.
"""

import argparse

import torch

from transformers_nextflow import NextFlowPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--output", default="image.png")
    parser.add_argument("--model", default="checkpoints/nextflow-shapes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = NextFlowPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    drawn = pipe(args.prompt, think=True, generator=torch.Generator().manual_seed(args.seed))
    print(drawn.thoughts[0])
    drawn.images[0].save(args.output)


if __name__ == "__main__":
    main()
