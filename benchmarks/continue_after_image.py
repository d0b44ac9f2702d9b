"""Compare two ways to continue with text after an image that was just drawn: on its cache, or by reading it again.

    python benchmarks/continue_after_image.py --side 64

A model that cannot continue on the cache must read its own image again: it decodes the image, encodes it with the
vision tokenizer, and reads the prompt and all slots of the image before the next word. Both ways are timed until the
logits of the next word.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from backbone import CHECKPOINT, RANDOM_BACKBONES, RESULTS, load_model, random_prompt
from tqdm import trange

from transformers_nextflow import ImageSampling, NextFlowForConditionalGeneration
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.generation.cached_sequences import Prompts
from transformers_nextflow.generation.scale_loop import ImageCodes
from transformers_nextflow.generation.sequence_writer import SequenceWriter
from transformers_nextflow.scale_schedule import SQUARE_SIDES


PROMPT_LENGTH = 16


@torch.no_grad()
def measure(model: NextFlowForConditionalGeneration, side: int, seed: int = 0) -> dict[str, float]:
    """Returns the seconds of one drawing and of each way to the next word's logits; checks that the logits agree."""
    patch_size = model.config.vq_config.patch_size
    schedule = model.config.vq_config.scale_schedules.for_size(side * patch_size, side * patch_size)
    writer = SequenceWriter(model, Prompts(random_prompt(model.config, PROMPT_LENGTH)))
    drawing = ImageCodes(model, [schedule], ImageSampling(), torch.Generator().manual_seed(seed))
    seconds, marks = {}, [time.perf_counter()]

    def last_scale_drawn(caller, scale, state):
        if scale == schedule.num_scales - 1:
            marks.append(time.perf_counter())

    writer.draw(drawing, [0], last_scale_drawn)
    cached = writer.text_logits
    marks.append(time.perf_counter())
    seconds["drawing"], seconds["on the cache"] = marks[1] - marks[0], marks[2] - marks[1]

    finished = writer.finished()
    start = time.perf_counter()
    (pixels,) = model.decode_image_tokens(finished.image_tokens, finished.image_grids)
    model.get_image_tokens(pixels[None].clamp(-1, 1), finished.image_grids)
    seconds["decoding and encoding"] = time.perf_counter() - start
    start = time.perf_counter()
    # The drawn codes are read, so that logits can be compared; encoding gives as many codes, but other ones.
    anew = SequenceWriter(model, finished).text_logits
    seconds["reading anew"] = time.perf_counter() - start
    torch.testing.assert_close(cached, anew, atol=1e-3, rtol=1e-3)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=CHECKPOINT, help=f"a checkpoint, or one of {list(RANDOM_BACKBONES)}")
    parser.add_argument(
        "--side", type=int, default=64, help="side of the final grid in cells; 64 is the paper's 1024 level"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()

    model = load_model(arguments.model, SQUARE_SIDES, (arguments.side,))
    runs = [measure(model, arguments.side) for _ in trange(arguments.repeats, unit="run")]
    seconds = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    for name, value in seconds.items():
        print(f"{name:<24} {value:>8.3f} s")
    again = seconds["reading anew"]
    values = {
        "speedup_over_reading_anew": again / seconds["on the cache"],
        "speedup_over_encoding_anew": (again + seconds["decoding and encoding"]) / seconds["on the cache"],
        "seconds": seconds,
        "model": arguments.model,
        "side": arguments.side,
        "read_last_scale": model.config.read_last_scale,
    }
    print(f"reading anew / on the cache: {values['speedup_over_reading_anew']:.1f}")
    print("written:", write_result(Path(arguments.results) / "continue_after_image.json", values))


if __name__ == "__main__":
    main()
