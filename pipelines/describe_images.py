"""Ask something about images and videos.

    python pipelines/describe_images.py "what is this?" image.png
    python pipelines/describe_images.py "what happens?" video.gif --model checkpoints/nextflow-shapes

`transformers-nextflow describe` does the same with more options.
"""

import argparse
from pathlib import Path

import torch

from transformers_nextflow import NextFlowPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("files", nargs="+", help="images, or videos (.gif, .mp4)")
    parser.add_argument("--model", default="checkpoints/nextflow-emoji")
    args = parser.parse_args()

    pipe = NextFlowPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    content = []
    for file in args.files:
        kind = "video" if Path(file).suffix.lower() in (".gif", ".mp4") else "image"
        content.append({"type": kind, kind: file})
    content.append({"type": "text", "text": args.question})
    answer = pipe.chat([{"role": "user", "content": content}], max_images=0, do_sample=False)
    print("".join(part["text"] for part in answer["content"]))


if __name__ == "__main__":
    main()
