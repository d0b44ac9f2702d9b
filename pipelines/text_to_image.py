"""Draw an image from a prompt, and save a preview after each scale beside it.

    python pipelines/text_to_image.py "a rocket, 3d style" --model checkpoints/nextflow-emoji --seed 1

`transformers-nextflow generate` does the same with more options; this script is the few lines to start one's own from.
"""

import argparse
from pathlib import Path

import torch

from transformers_nextflow import NextFlowPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="checkpoints/nextflow-emoji")
    parser.add_argument("--output", type=Path, default=Path("image.png"))
    parser.add_argument("--guidance-scale", type=float, help="default: the checkpoint's own")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def save_preview(pipe, step, scale, callback_kwargs):
        callback_kwargs["preview"][0].save(args.output.with_stem(f"{args.output.stem}-scale-{scale + 1}"))

    pipe = NextFlowPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    image = pipe(
        args.prompt,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
        callback_on_step_end=save_preview,
        callback_on_step_end_tensor_inputs=["preview"],
    ).images[0]
    image.save(args.output)


if __name__ == "__main__":
    main()
