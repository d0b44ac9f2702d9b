"""Draw several candidates and keep the one that the model itself finds best described by the prompt.

    python pipelines/draw_the_best.py "a rocket, 3d style" --candidates 4

`transformers-nextflow generate --num-candidates` does the same with more options.
"""

import argparse

import torch

from transformers_nextflow import NextFlowPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--output", default="image.png")
    parser.add_argument("--model", default="checkpoints/nextflow-emoji")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = NextFlowPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    generators = [torch.Generator().manual_seed(args.seed + number) for number in range(args.candidates)]
    drawn = pipe(args.prompt, num_candidates=args.candidates, generator=generators)
    if drawn.candidate_scores is not None:
        print("Log-likelihoods of the prompt per token:", drawn.candidate_scores[0].tolist())
    drawn.images[0].save(args.output)


if __name__ == "__main__":
    main()
