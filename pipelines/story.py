"""Have a story told in images and text, and show both as they come.

python pipelines/story.py "tell a story in three pictures: a red circle on a white background" --images 3
"""

import argparse
from pathlib import Path
from threading import Thread

import torch

from transformers_nextflow import InterleavedStreamer, NextFlowPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--images", type=int, default=3, help="at most")
    parser.add_argument("--output", type=Path, default=Path("story.png"), help="images are numbered")
    parser.add_argument("--model", default="checkpoints/nextflow-shapes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = NextFlowPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    streamer = InterleavedStreamer(pipe.processor.tokenizer, skip_special_tokens=True)
    arguments = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": args.prompt}]}],
        "max_images": args.images,
        "generator": torch.Generator().manual_seed(args.seed),
        "streamer": streamer,
    }
    thread = Thread(target=pipe.chat, kwargs=arguments)
    thread.start()
    number = 0
    for piece in streamer:
        if isinstance(piece, str):
            print(piece, end="", flush=True)
        elif piece.is_finished:
            number += 1
            path = args.output.with_stem(f"{args.output.stem}-{number}")
            pipe.processor.post_process_images(piece.preview())[0].save(path)
            print(f"[{path}]", flush=True)
    thread.join()
    print()


if __name__ == "__main__":
    main()
