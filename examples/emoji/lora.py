"""Teach an emoji checkpoint a new style from 30 images, or a new concept from five images, with LoRA.

    python examples/emoji/lora.py --teach style --judge runs/emoji/medium/judge
    python examples/emoji/lora.py --teach concept --judge runs/emoji/medium/judge

The style is `KEPT_STYLE` and the concept is `KEPT_CONCEPT` of `sizes.py`; no training shows either. Half of the samples
are like those on which the checkpoint was trained, so that it does not forget them. Afterwards the style is asked for
with concepts that the 30 images do not show, and the concept in styles that the five images do not show. A drawing is
identified by the nearest of all renders in the features of a judge. "plainly" is the share of drawings that show the
concept if no style is asked for, "reconstructed" are the scores of the tokenizer's reconstructions of the true renders.

Writes the adapter to `--output`, beside it a sheet with requested drawings (rows: true render, before, after), and the
scores to `RESULTS/emoji_lora_TEACH.json`.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from datasets import Dataset
from make_data import FEATURES, encode_scenes, images_in, row, sample
from PIL import Image
from sizes import KEPT_CONCEPT, KEPT_STYLE

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowPipeline
from transformers_nextflow.adapters import lora_config
from transformers_nextflow.evaluation.image_metrics import save_sheet
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer, NextFlowTrainingArguments
from transformers_nextflow.worlds.conversations import Exchange, drawing
from transformers_nextflow.worlds.emoji import Art, Item, Requirement, Scene, Sticker, World, render, write_caption
from transformers_nextflow.worlds.emoji.evaluation import ART, BATCH_SIZE, JUDGE, WORLD, EmojiEvaluation
from transformers_nextflow.worlds.emoji.judge import Judge
from transformers_nextflow.worlds.emoji.requirement import item_of
from transformers_nextflow.worlds.emoji.scene import BACKGROUNDS, choose


SHOWN_OF_STYLE, SHOWN_OF_CONCEPT = 30, 5
SHEET_COLUMNS = 12
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Lesson:
    """The (concept, style) pairs that are shown in training, and those that are asked for afterwards.

    The asked ones repeat until there are as many as wanted; each drawing has a seed of its own.
    """

    shown: list[tuple[str, str]]
    asked: list[tuple[str, str]]


def lesson_of(teach: str, art: Art, world: World, limit: int, seed: int) -> Lesson:
    """Makes a lesson of the new style or the new concept. Raises `ValueError` if the world already has it."""
    if teach == "style":
        if KEPT_STYLE in world.styles:
            raise ValueError(f"The world of this judge shows the style {KEPT_STYLE}, which was to be new.")
        pairs = [(c, KEPT_STYLE) for c in world.concepts if (c, KEPT_STYLE) in art.drawings]
        count = SHOWN_OF_STYLE
    else:
        (concept,) = (key for key, one in art.concepts.items() if one.name == KEPT_CONCEPT)
        if concept in world.concepts:
            raise ValueError(f"The world of this judge shows the {KEPT_CONCEPT}, which was to be new.")
        pairs = [(concept, style) for style in art.styles if style != KEPT_STYLE and (concept, style) in art.drawings]
        count = min(SHOWN_OF_CONCEPT, len(pairs) - 1)
    rng = np.random.default_rng((seed, 5))
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    if teach == "concept":
        # What is asked for comes last: it is in a style that the checkpoint knows.
        pairs.sort(key=lambda pair: pair[1] in world.styles)
    return Lesson(pairs[:count], list(itertools.islice(itertools.cycle(pairs[count:]), limit)))


def prompt_of(rng: np.random.Generator | None, scene: Scene, world: World) -> str:
    """Returns a caption that names style and background."""
    (sticker,) = scene.stickers
    item = item_of(sticker, world, color=None, tone=None, turn=None)
    return write_caption(rng, Requirement((item,), None, scene.background), world)


def exchanges_of(lesson: Lesson, world: World, old: World, count: int, seed: int) -> list[list[Exchange]]:
    """Makes exchanges, half with the lesson's images on any background, half like those of the first training."""
    rng, found = np.random.default_rng((seed, 6)), []
    for index in range(count):
        if index % 2:
            found.append(sample(rng, old, "small", "drawing"))
            continue
        scene = Scene((Sticker(*choose(rng, lesson.shown)),), choose(rng, list(BACKGROUNDS)))
        found.append([drawing(prompt_of(rng, scene, world), scene)])
    return found


@torch.no_grad()
def rows_of(exchanges: list[list[Exchange]], model: NextFlowForConditionalGeneration, world: World) -> Dataset:
    scenes = [scene for one in exchanges for scene, _ in images_in(one)]
    codes = iter(encode_scenes(model.vq_model, scenes, world, None, torch.Generator()))
    return Dataset.from_list(
        [row(one, [next(codes) for _ in images_in(one)], world, None) for one in exchanges], features=FEATURES
    )


class Recogniser:
    """Finds the single drawing on white that is nearest to an image in the features of a judge."""

    def __init__(self, judge: Judge, world: World):
        self.judge, self.pairs = judge, world.pairs
        renders = [render(Scene((Sticker(*pair),)), world) for pair in self.pairs]
        self.vectors = judge.embed_images(renders)

    def name(self, images) -> list[tuple[str, str]]:
        nearest = (self.judge.embed_images(images) @ self.vectors.T).argmax(-1)
        return [self.pairs[int(i)] for i in nearest]


def draw(pipe: NextFlowPipeline, prompts: list[str], world: World) -> list[Image.Image]:
    """Draws square images, each with the seed of its place, in batches."""
    images = []
    for start in range(0, len(prompts), BATCH_SIZE):
        part = prompts[start : start + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images += pipe(part, height=world.side, width=world.side, generator=generators).images
    return images


def shares(named: list[tuple[str, str]], asked: list[tuple[str, str]]) -> dict[str, float]:
    """Returns the shares of drawings whose nearest render has the concept, the style, and both."""
    pairs = list(zip(named, asked, strict=True))
    return {
        "concept": float(np.mean([a[0] == b[0] for a, b in pairs])),
        "style": float(np.mean([a[1] == b[1] for a, b in pairs])),
        "both": float(np.mean([a == b for a, b in pairs])),
    }


def train(model: peft.PeftModel, processor, rows: Dataset, arguments: argparse.Namespace):
    on_cpu = not torch.cuda.is_available()
    args = NextFlowTrainingArguments(
        output_dir=str(arguments.output),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, arguments.steps // 10),
        max_grad_norm=1.0,
        logging_steps=20,
        save_strategy="no",
        use_cpu=on_cpu,
        bf16=not on_cpu,
        seed=arguments.seed,
        report_to=[],
    )
    NextFlowTrainer(model, args, train_dataset=rows, data_collator=NextFlowCollator(processor)).train()
    model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teach", choices=["style", "concept"], default="style")
    parser.add_argument("--checkpoint", default="checkpoints/nextflow-emoji")
    parser.add_argument("--art", type=Path, default=ART)
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/lora"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument(
        "--limit", type=int, default=100, help="number of requested drawings, and of held-out prompts of the old world"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    art, judge = Art(arguments.art), Judge.load(arguments.judge)
    old = World.load(arguments.judge / WORLD, art)
    lesson = lesson_of(arguments.teach, art, old, arguments.limit, arguments.seed)
    new_styles = tuple(dict.fromkeys((*old.styles, *(style for _, style in lesson.shown))))
    new_concepts = tuple(dict.fromkeys((*old.concepts, *(concept for concept, _ in lesson.shown))))
    world = World(art, old.side, old.patch_size, old.ratios, new_concepts, new_styles, old.kinds, old.plain)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = NextFlowPipeline.from_pretrained(arguments.checkpoint, dtype=torch.float32).to(device)
    model, processor = pipe.model, pipe.processor
    recogniser = Recogniser(judge.to(device), world)
    evaluation = EmojiEvaluation(pipe, old, judge, arguments.limit)

    prompts = [prompt_of(None, Scene((Sticker(*pair),)), world) for pair in lesson.asked]
    plain = [write_caption(None, Requirement((Item(c),), None, "white"), world) for c, _ in lesson.asked]
    true = [render(Scene((Sticker(*pair),)), world) for pair in lesson.asked]

    def scores() -> tuple[dict, list[Image.Image]]:
        images = draw(pipe, prompts, world)
        plainly = shares(recogniser.name(draw(pipe, plain, world)), lesson.asked)["concept"]
        old_drawing = evaluation.suite("drawing", evaluation.draw)["overall"]
        taught = shares(recogniser.name(images), lesson.asked)
        return taught | {"plainly": plainly, "old_drawing": old_drawing}, images

    before, drawn_before = scores()
    torch.manual_seed(arguments.seed)
    count = arguments.steps * arguments.batch_size
    rows = rows_of(exchanges_of(lesson, world, old, count, arguments.seed), model, world)
    adapted = peft.get_peft_model(model, lora_config(model, arguments.rank))
    train(adapted, processor, rows, arguments)
    adapted.save_pretrained(arguments.output)
    # The adapter is inserted into the layers, so the pipeline's own model has it too.
    after, drawn_after = scores()
    sheet = ([Image.fromarray(image) for image in true], drawn_before, drawn_after)
    save_sheet([images[:SHEET_COLUMNS] for images in sheet], arguments.output / "sheet.png")
    values = {
        "taught": arguments.teach,
        "shown": len(lesson.shown),
        "asked": len(set(lesson.asked)),
        "drawings": len(lesson.asked),
        "before": before,
        "after": after,
        "reconstructed": shares(recogniser.name(evaluation.reconstruct(true)), lesson.asked),
        "old_drop": before["old_drawing"] - after["old_drawing"],
        "adapter_mib": (arguments.output / "adapter_model.safetensors").stat().st_size / 2**20,
    }
    print(values)
    print("written:", write_result(arguments.results / f"emoji_lora_{arguments.teach}.json", values, device))


if __name__ == "__main__":
    main()
