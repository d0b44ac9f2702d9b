"""Draw a video frame by frame, from a prompt or from a first frame.

    python pipelines/video.py "a red circle in row 2 column 1. the red circle moves right" --frames 4

`transformers-nextflow video` does the same with more options.
"""

import argparse

import torch

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.video_processing_nextflow import write_frames


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--first-frame", help="an image file")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--output", default="video.gif", help=".gif, or .mp4 with the extra `video`")
    parser.add_argument("--model", default="checkpoints/nextflow-shapes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = NextFlowPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    video = pipe.video(
        args.prompt,
        image=args.first_frame,
        num_frames=args.frames,
        generator=torch.Generator().manual_seed(args.seed),
    )
    print("\n".join(video.transitions[0]))
    write_frames(video.frames[0], args.output)


if __name__ == "__main__":
    main()
