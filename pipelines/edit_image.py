"""Edit an image; with a mask only inside of it.

    python pipelines/edit_image.py "make the red circle blue" image.png --mask mask.png

`transformers-nextflow edit` does the same with more options.
"""

import argparse

import torch

from transformers_nextflow import NextFlowPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("instruction")
    parser.add_argument("image", help="an image file")
    parser.add_argument("--mask", help="an image that is light where is to be drawn; all else is pasted back")
    parser.add_argument("--output", default="edited.png")
    parser.add_argument("--model", default="checkpoints/nextflow-shapes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = NextFlowPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    image = pipe(
        args.instruction,
        image=args.image,
        mask_image=args.mask,
        paste_back=args.mask is not None,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    image.save(args.output)


if __name__ == "__main__":
    main()
