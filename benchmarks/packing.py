"""Measure useful tokens a second, and how evenly two workers are loaded, for the three kinds of packing (CPU).

    python benchmarks/packing.py

The same samples are trained on in padded batches, in packs of a fixed length and in packs of fixed compute. They are
text, drawings, captions, edits and interleaved images at a small and a large level, whose images differ fourfold in
tokens as those of the paper's 256 and 512 levels do. A step is the forward and backward pass of two layers of the
random model, with its default attention in all of them and without the optimiser. The three kinds run side by side on
one thread each, and seconds are processor time. All tokens except padding are useful. Two workers take the batches in
turn; the wait is the average share of a step in which the faster one waits for the slower one. Writes
`results/packing.json`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from backbone import CHECKPOINT, RESULTS, random_config, with_sides
from tqdm import tqdm
from transformers import AutoTokenizer

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowImageProcessor, NextFlowProcessor
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.trainers import CostModel, NextFlowCollator, PackedDataset


SIDES, LEVEL_SIDES = (1, 2, 4, 6, 8, 12, 16), (8, 16)
# 25% of the samples are text (paper, table 1); 10% of the pairs of image and text become captioning (section 3.2).
SHARES = {"text": 0.25, "drawing": 0.36, "caption": 0.04, "edit": 0.15, "interleaved": 0.2}
# Numbers of frames of interleaved samples at the small and the large level (section 4.1).
MAX_FRAMES = {8: 5, 16: 3}
# Two layers are enough, since all layers cost the same.
LAYERS = 2
TARGET_SPEEDUP = 3.0
WAYS = ("padding", "length", "compute")


def make_model() -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    """Makes the random model on a schedule of two levels, and its processor."""
    config = with_sides(random_config(), SIDES, LEVEL_SIDES)
    config.text_config.num_hidden_layers, config.text_config.layer_types = LAYERS, ["full_attention"] * LAYERS
    image_processor = NextFlowImageProcessor(SIDES, config.vq_config.patch_size, config.vq_config.levels)
    processor = NextFlowProcessor(image_processor, AutoTokenizer.from_pretrained(CHECKPOINT))
    for name in ("boi_token_id", "eoi_token_id", "image_token_id"):
        setattr(config, name, getattr(processor, name))
    torch.manual_seed(0)
    return NextFlowForConditionalGeneration(config), processor


def make_rows(processor: NextFlowProcessor, count: int) -> list[dict]:
    generator = random.Random(0)

    def words(mean: int) -> dict:
        length = 1 + int(generator.lognormvariate(0, 0.7) * mean)
        return {"type": "text", "text": " ".join(generator.choices(("red", "blue", "circle", "star", "two"), k=length))}

    def row() -> dict:
        task, side = generator.choices(list(SHARES), SHARES.values())[0], generator.choice(LEVEL_SIDES)
        image = {"type": "image"}
        if task == "text":
            question, answer = [words(40)], [words(120)]
        elif task == "drawing":
            question, answer = [words(30)], [image]
        elif task == "caption":
            question, answer = [image, words(5)], [words(30)]
        elif task == "edit":
            question, answer = [image, words(12)], [image]
        else:
            frames = generator.randint(2, MAX_FRAMES[side])
            question, answer = [words(12)], [part for _ in range(frames) for part in (words(15), image)]
        parts = question + answer
        images = sum(part["type"] == "image" for part in parts)
        schedule = processor.image_processor.schedule_for_grid(side, side)
        return {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "image_tokens": [generator.choices(range(1024), k=schedule.num_tokens) for _ in range(images)],
            "image_grids": [[side, side]] * images,
        }

    return [row() for _ in range(count)]


def batches_of(packing: str, rows: list[dict], collator: NextFlowCollator, model: CostModel, budgets: dict):
    """Returns the shuffled batches of one epoch, and the useful tokens and the cost of each."""
    sizes = {id(row): collator.size(row) for row in rows}
    costs = {key: model.cost(size) for key, size in sizes.items()}
    if packing == "padding":
        count = max(1, round(budgets["length"] * len(rows) / sum(size.length for size in sizes.values())))
        groups = [rows[start : start + count] for start in range(0, len(rows), count)]
    else:
        measure = (lambda row: sizes[id(row)].length) if packing == "length" else (lambda row: costs[id(row)])
        groups = list(PackedDataset(rows, measure, budgets[packing]))
        random.Random(0).shuffle(groups)
    batches = [collator(group if packing == "padding" else [group]) for group in groups]
    useful = [sum(sizes[id(row)].length for row in group) for group in groups]
    return batches, useful, [sum(costs[id(row)] for row in group) for group in groups]


def wait(amounts: list[float]) -> float:
    """Returns the average share of a step in which the faster of two workers waits."""
    # The last step may hold only the rest of the epoch.
    pairs = list(zip(amounts[:-2:2], amounts[1:-1:2]))
    return statistics.mean(1 - min(pair) / max(pair) for pair in pairs)


def measure(model: NextFlowForConditionalGeneration, batches: list[dict], progress: tqdm) -> list[float]:
    """Returns the processor seconds of each step."""
    seconds = []
    for batch in [batches[0], *batches]:
        start = time.process_time()
        model(**batch).loss.backward()
        seconds.append(time.process_time() - start)
        model.zero_grad()
        progress.update(batch["input_ids"].numel())
    return seconds[1:]


def figures_of(packing: str, samples: int, budgets: dict) -> dict:
    torch.set_num_threads(1)
    model, processor = make_model()
    collator, rows = NextFlowCollator(processor), make_rows(processor, samples)
    batches, useful, costs = batches_of(packing, rows, collator, CostModel.from_config(model.config), budgets)
    places = sum(batch["input_ids"].numel() for batch in batches)
    position = WAYS.index(packing)
    with tqdm(total=places + batches[0]["input_ids"].numel(), unit="token", desc=packing, position=position) as bar:
        seconds = measure(model, batches, bar)
    return {
        "tokens_per_second": sum(useful) / sum(seconds),
        "steps": len(batches),
        "useful_share": sum(useful) / places,
        "wait": wait(seconds),
        "modelled_wait": wait(costs),
        "seconds": seconds,
        "costs": costs,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument(
        "--length_budget",
        type=int,
        default=4096,
        help="positions in a pack; padded batches have as many rows on average",
    )
    parser.add_argument("--compute_budget", type=int, default=6144, help="cost of a pack in positions; see CostModel")
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()

    budgets = {"length": arguments.length_budget, "compute": arguments.compute_budget}
    with ProcessPoolExecutor(len(WAYS), multiprocessing.get_context("spawn")) as pool:
        figures = pool.map(figures_of, WAYS, [arguments.samples] * len(WAYS), [budgets] * len(WAYS))
        ways = dict(zip(WAYS, figures))
    for way, figures in ways.items():
        print(
            f"{way:<8} {figures['tokens_per_second']:>8.0f} useful tokens/s, {figures['useful_share']:>6.1%} useful, "
            f"{figures['steps']:>3} steps, wait {figures['wait']:.1%} (by the model {figures['modelled_wait']:.1%})"
        )
    speed = {way: figures["tokens_per_second"] / ways["padding"]["tokens_per_second"] for way, figures in ways.items()}
    print(f"over padding: length {speed['length']:.2f}, compute {speed['compute']:.2f} (target {TARGET_SPEEDUP})")
    values = {
        "speedup_over_padding": {way: round(speed[way], 2) for way in ("length", "compute")},
        "wait": {way: round(figures["wait"], 4) for way, figures in ways.items()},
        "samples": arguments.samples,
        "budgets": budgets,
        "ways": ways,
    }
    print("written:", write_result(Path(arguments.results) / "packing.json", values))


if __name__ == "__main__":
    main()
