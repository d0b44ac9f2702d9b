"""The share of the scale loop's time that is not spent in forward passes, and where it goes (CPU, batch 1).

    python benchmarks/loop_overhead.py

Forward passes are those of the backbone, of the visual head and of the visual embedding; all else counts as `overhead`,
the draw from the soft-max and the guidance of logits included. These two are arithmetic on all codes, which no loop can
do without; `overhead_without_sampling` leaves them out. The parts come from drawings of their own, since looking at
each of them takes time too. Seconds are medians over drawings; the target is 5% at most.
Writes `results/loop_overhead.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

from backbone import CHECKPOINT, RANDOM_BACKBONES, RESULTS, load_model, random_prompt
from tqdm import tqdm

from transformers_nextflow import ImageSampling, NextFlowForConditionalGeneration
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.generation import image_codes, scale_loop, sequence_writer
from transformers_nextflow.generation.cached_sequences import CachedSequences
from transformers_nextflow.generation.image_codes import ImageCodes
from transformers_nextflow.modeling_nextflow import NextFlowModel
from transformers_nextflow.scale_schedule import SQUARE_SIDES, ScaleSchedules


FORWARD = "forward passes"
SAMPLING = ("guidance", "draw of codes")
TARGET = 0.05
PROMPT_LENGTH, NEGATIVE_LENGTH = 16, 6


class Stopwatch:
    """Seconds spent in functions by label, each without those that were called inside of it."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.last = 0.0

    def timed(self, function, label: str):
        def run(*args, **kwargs):
            self._turn(push=label)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()

        return run

    def _turn(self, push: str | None = None):
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.last
        self.open.append(push) if push else self.open.pop()
        self.last = time.perf_counter()


def forward_parts(model: NextFlowForConditionalGeneration) -> list[tuple]:
    embedding = model.model.visual_embedding
    owners = (model.model.language_model, model.visual_head, embedding)
    return [(owner, "forward", FORWARD) for owner in owners] + [(embedding, "slot_features", FORWARD)]


OTHER_PARTS = [
    (ImageCodes, "__init__", "settings of all scales"),
    (ImageCodes, "slots", "slots: codes to rows"),
    (ImageCodes, "sample", "codes: rows"),
    (CachedSequences, "read", "prefill"),
    (CachedSequences, "read_slots", "slots: positions"),
    (CachedSequences, "_mask", "mask"),
    (CachedSequences, "keep", "end of guidance"),
    (NextFlowModel, "layout_batch", "prefill: layout"),
    (sequence_writer, "join_prompts", "join of both prompts"),
    (scale_loop, "guide_over_contexts", "guidance"),
    (image_codes, "sample_codes", "draw of codes"),
    (ScaleSchedules, "for_size", "schedule of the size"),
]


def measure(
    model: NextFlowForConditionalGeneration, side: int, guided: bool, repeats: int, parts: list[tuple]
) -> dict[str, float]:
    """Seconds of one drawing by part, each the median over `repeats` drawings: other processes may interrupt some."""
    watch, size = Stopwatch(), side * model.config.vq_config.patch_size
    options = {
        "image_sizes": [(size, size)],
        "sampling": ImageSampling(guidance_scale=3.0 if guided else 1.0),
        "negative_input_ids": random_prompt(model.config, NEGATIVE_LENGTH) if guided else None,
    }
    prompt = random_prompt(model.config, PROMPT_LENGTH)
    for _ in range(2):
        model.generate_images(prompt, **options)
    patches = [patch.object(owner, name, watch.timed(getattr(owner, name), label)) for owner, name, label in parts]
    for part in patches:
        part.start()
    try:
        draw, drawings = watch.timed(model.generate_images, "loop"), []
        for _ in range(repeats):
            watch.seconds.clear()
            draw(prompt, **options)
            drawings.append(dict(watch.seconds))
    finally:
        for part in patches:
            part.stop()
    return {label: statistics.median(drawing[label] for drawing in drawings) for label in drawings[0]}


def figures_of(model: NextFlowForConditionalGeneration, side: int, guided: bool, repeats: int) -> dict:
    forward = forward_parts(model)
    seconds = measure(model, side, guided, repeats, forward)
    total = sum(seconds.values())
    parts = measure(model, side, guided, repeats, forward + OTHER_PARTS)
    overhead = 1 - seconds[FORWARD] / total
    return {
        "overhead": overhead,
        "overhead_without_sampling": overhead - sum(parts[label] for label in SAMPLING) / sum(parts.values()),
        "seconds": total,
        "parts": parts,
    }


def print_table(case: str, figures: dict):
    verdict = "within" if figures["overhead"] <= TARGET else "above"
    print(
        f"\n{case}: {1e3 * figures['seconds']:.1f} ms, overhead {figures['overhead']:.1%} ({verdict} {TARGET:.0%}), "
        f"without sampling {figures['overhead_without_sampling']:.1%}"
    )
    for label, seconds in sorted(figures["parts"].items(), key=lambda item: -item[1]):
        print(f"  {label:<28} {1e3 * seconds:>9.3f} ms {seconds / figures['seconds']:>7.2%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=CHECKPOINT, help=f"a checkpoint, or one of {list(RANDOM_BACKBONES)}")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()

    own, paper = load_model(arguments.model), load_model(arguments.model, SQUARE_SIDES, (16,))
    own_side = own.config.vq_config.scales[-1]
    cases = [
        (f"{name}, {'guidance' if guided else 'no guidance'}", model, side, guided)
        for name, model, side in (("own schedule", own, own_side), ("paper's 256 level", paper, 16))
        for guided in (False, True)
    ]
    figures = {
        case: figures_of(model, side, guided, arguments.repeats)
        for case, model, side, guided in tqdm(cases, unit="case", desc="drawing")
    }
    for case, values in figures.items():
        print_table(case, values)
    values = {
        "overhead": {case: round(values["overhead"], 4) for case, values in figures.items()},
        "overhead_without_sampling": {
            case: round(values["overhead_without_sampling"], 4) for case, values in figures.items()
        },
        "model": arguments.model,
        "cases": figures,
    }
    print("\nwritten:", write_result(Path(arguments.results) / "loop_overhead.json", values))


if __name__ == "__main__":
    main()
