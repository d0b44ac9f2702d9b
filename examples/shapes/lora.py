"""Teach the bundled checkpoint a new word with LoRA, in minutes on two cores.

    OMP_NUM_THREADS=2 python examples/shapes/lora.py --bf16

The word is "house". A house is a triangle directly above a square of the same colour; it stands on the ground, which is
the last row. Shapes, colours and cells are those of the checkpoint's world, so its vision tokenizer has codes for every
house. Only the combination and the word are new. A held-out pair of shape and colour could not be taught in this way,
since codes stand for shape, colour and place together, so the heads would have to change (docs/decisions.md).

Every step trains on houses and on samples of the checkpoint's own training data, so that the model does not forget the
rest. Before and after the training, the script scores captions of houses that are kept for evaluation, and the suites
of drawing and understanding. It writes the adapter (`--output`) and `benchmarks/results/lora.json`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import peft
import torch
from datasets import Dataset
from make_data import FEATURES, encode_scenes, images_in, row, sample
from transformers import AutoProcessor

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.adapters import lora_config
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer, NextFlowTrainingArguments
from transformers_nextflow.worlds.shapes import Exchange, Object, Scene, World, drawing, is_reserved, read
from transformers_nextflow.worlds.shapes.evaluation import ShapesEvaluation
from transformers_nextflow.worlds.shapes.language import BACKGROUND_TEMPLATES, PREFIXES
from transformers_nextflow.worlds.shapes.scene import choose


WORLD = World()
CHECKPOINT = "checkpoints/nextflow-shapes"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROOF, WALL = "triangle", "square"
# The colours in which neither part of a house is a pair that the checkpoint never drew.
COLORS = tuple(c for c in WORLD.palette if not {(ROOF, c), (WALL, c)} & set(WORLD.held_out_pairs))
# The share of captions that leave the colour open, and of those that name the background.
UNCOLORED, ON_BACKGROUND = 0.2, 0.5
# The share of empty prompts, which guidance needs.
EMPTY = 0.1


def house(color: str, column: int, background: str) -> Scene:
    last = WORLD.lattice - 1
    return Scene((Object(ROOF, color, last - 1, column), Object(WALL, color, last, column)), background)


def house_caption(rng: np.random.Generator) -> tuple[str, str | None, str | None]:
    """Returns a caption of a house, and the colour and the background that it names."""
    color = None if rng.random() < UNCOLORED else choose(rng, COLORS)
    background = choose(rng, WORLD.backgrounds)[0] if rng.random() < ON_BACKGROUND else None
    text = choose(rng, PREFIXES) + " ".join(["a", *filter(None, [color]), "house"])
    if background:
        text = choose(rng, BACKGROUND_TEMPLATES).format(body=text, color=background)
    return text, color, background


def house_exchange(rng: np.random.Generator) -> Exchange:
    """Makes a training sample: a caption that is not kept for evaluation, and a matching house at any place."""
    while True:
        text, color, background = house_caption(rng)
        if not is_reserved(text):
            break
    image = house(
        color or choose(rng, COLORS),
        int(rng.integers(WORLD.lattice)),
        background or choose(rng, WORLD.backgrounds)[0],
    )
    return drawing("" if rng.random() < EMPTY else text, image)


def evaluation_captions(count: int, seed: int = 0) -> list[tuple[str, str | None, str | None]]:
    """Returns different captions of houses that are kept for evaluation."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        caption = house_caption(rng)
        if is_reserved(caption[0]):
            found.setdefault(caption[0], caption)
    return list(found.values())


def is_house(scene: Scene, color: str | None, background: str | None) -> bool:
    """Tells whether the image holds a house as asked for, and nothing else."""
    colors = COLORS if color is None else (color,)
    grounds = WORLD.background_palette if background is None else (background,)
    return scene in [house(*case) for case in itertools.product(colors, range(WORLD.lattice), grounds)]


@torch.no_grad()
def training_rows(model: NextFlowForConditionalGeneration, count: int, new_share: float, seed: int) -> Dataset:
    """Makes rows with codes: houses, and conversations like those in the checkpoint's training."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    samples = [[house_exchange(rng)] if rng.random() < new_share else sample(rng) for _ in range(count)]
    schedule = model.config.vq_config.scale_schedules.for_size(WORLD.canvas, WORLD.canvas)
    slots = schedule.num_slots(model.config.read_last_scale) + 2
    scenes = [scene for exchanges in samples for scene, _ in images_in(exchanges)]
    codes = encode_scenes(model.vq_model, scenes, None, generator)
    grid = list(schedule.final_grid)
    return Dataset.from_list([row(exchanges, codes, grid, slots) for exchanges in samples], features=FEATURES)


def score_houses(evaluation: ShapesEvaluation, count: int) -> float:
    captions = evaluation_captions(count)
    images = evaluation.draw([text for text, *_ in captions], seed=0)
    return float(np.mean([is_house(read(p, WORLD), *asked) for p, (_, *asked) in zip(images, captions)]))


def scores(evaluation: ShapesEvaluation, houses: int) -> dict[str, float]:
    return {
        "new_concept": score_houses(evaluation, houses),
        "text_to_image": evaluation.text_to_image()["overall"],
        "understanding": evaluation.understanding()["overall"],
    }


def draw_with_adapter(checkpoint: str, adapter: str, prompts: list[str]) -> np.ndarray:
    """Draws with the loaded adapter, in a new process."""
    model = peft.PeftModel.from_pretrained(NextFlowForConditionalGeneration.from_pretrained(checkpoint), adapter)
    return ShapesEvaluation(model, AutoProcessor.from_pretrained(checkpoint)).draw(prompts, seed=1)


def train(model: peft.PeftModel, processor, rows: Dataset, arguments: argparse.Namespace):
    args = NextFlowTrainingArguments(
        output_dir=str(arguments.output),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, arguments.steps // 10),
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length",
        logging_steps=20,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=arguments.bf16,
        seed=arguments.seed,
        report_to=[],
    )
    collator = NextFlowCollator(processor, pad_to_multiple_of=8)
    # On CPUs its backward pass is faster than that of the fused kernel.
    model.get_base_model().set_attn_implementation("eager")
    NextFlowTrainer(model, args, train_dataset=rows, data_collator=collator).train()
    model.get_base_model().set_attn_implementation("sdpa")
    model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--output", type=Path, default=Path("runs/lora"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--new_share", type=float, default=0.5, help="share of the samples that show the new concept")
    parser.add_argument(
        "--bf16", action="store_true", help="train in bfloat16, which is faster on a processor with bfloat16 units"
    )
    parser.add_argument("--limit", type=int, default=100, help="number of scored prompts of each category")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    model = NextFlowForConditionalGeneration.from_pretrained(arguments.checkpoint)
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    torch.manual_seed(arguments.seed)
    evaluation = ShapesEvaluation(model, processor, arguments.limit, seeds=1)
    before = scores(evaluation, arguments.limit)
    start = time.perf_counter()
    rows = training_rows(model, arguments.steps * arguments.batch_size, arguments.new_share, arguments.seed)
    adapted = peft.get_peft_model(model, lora_config(model, arguments.rank))
    train(adapted, processor, rows, arguments)
    minutes = (time.perf_counter() - start) / 60
    adapted.save_pretrained(arguments.output)

    prompts = [text for text, *_ in evaluation_captions(8, seed=1)]
    after = scores(evaluation, arguments.limit)
    drawn = evaluation.draw(prompts, seed=1)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        again = fresh.submit(draw_with_adapter, arguments.checkpoint, str(arguments.output), prompts).result()
    drops = {name: before[name] - after[name] for name in ("text_to_image", "understanding")}
    values = {
        "new_concept_before": before["new_concept"],
        "new_concept_after": after["new_concept"],
        "old_suite_drop": max(drops.values()),
        "old_suite_drops": drops,
        "adapter_mib": (arguments.output / "adapter_model.safetensors").stat().st_size / 2**20,
        "same_in_a_fresh_process": bool(np.array_equal(drawn, again)),
        "minutes": minutes,
        "before": before,
        "after": after,
    }
    for name, value in values.items():
        print(f"{name}: {value}")
    print(write_result(arguments.results / "lora.json", values))


if __name__ == "__main__":
    main()
