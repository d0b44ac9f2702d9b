"""RL on the shapes world: scores before, GRPO on the first scales, scores after.

    python examples/shapes/rl.py --output_dir runs/rl --minutes 40
    python examples/shapes/rl.py --output_dir runs/rl-reading --reward reading
    python examples/shapes/rl.py --output_dir runs/rl-all --prefix 8

The prompts are captions that evaluation keeps no copy of; the scores are of reserved ones. Everything that was seen is
in `OUTPUT_DIR/rl.json`, pictures along the way in `OUTPUT_DIR/picture_grids`.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoProcessor, TrainerCallback

from transformers_nextflow import ImageSampling, NextFlowForConditionalGeneration
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.evaluation.shapes import CATEGORIES, World, is_reserved
from transformers_nextflow.evaluation.shapes.language import draw_category
from transformers_nextflow.evaluation.shapes_evaluation import ShapesEvaluation
from transformers_nextflow.trainers import NextFlowGRPOConfig, NextFlowGRPOTrainer, PictureGrids
from transformers_nextflow.trainers.rewards import ask_about_shapes, reading_reward, shapes_reward


CHECKPOINT = "checkpoints/nextflow-shapes"
WORLD = World()


def training_prompts(count: int, seed: int) -> Dataset:
    """Captions of GenEval's six categories in turn, none of which is kept for evaluation."""
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < count:
        category = CATEGORIES[len(rows) % len(CATEGORIES)]
        text, _, _ = draw_category(rng, WORLD, category, places=False)
        if not is_reserved(text):
            rows.append({"prompt": text, "category": category})
    return Dataset.from_list(rows)


def exploring(sampling: ImageSampling, num_prefix_scales: int, num_scales: int) -> ImageSampling:
    """A checkpoint's settings, with chance at every trained scale: those that take the likeliest code cannot learn."""
    temperatures = [sampling.value_at("temperature", scale, num_scales) for scale in range(num_scales)]
    least = min(t for t in temperatures if t > 0) if any(temperatures) else 1.0
    trained = [max(t, least) if scale < num_prefix_scales else t for scale, t in enumerate(temperatures)]
    return replace(sampling, temperature=trained)


class Curve(TrainerCallback):
    """Drawing scores along the way, and an end after so many minutes of training; scoring does not count."""

    def __init__(self, model, processor, every: int, limit: int, minutes: float | None):
        self.evaluation = ShapesEvaluation(model, processor, limit, seeds=1)
        self.every, self.minutes = every, minutes
        self.points: list[dict] = []
        self.seconds, self.resumed = 0.0, time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.score(state)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.resumed
        if state.global_step % self.every == 0:
            self.score(state)
        if self.minutes is not None and self.seconds > 60 * self.minutes:
            control.should_training_stop = True
        self.resumed = time.perf_counter()

    def score(self, state):
        model = self.evaluation.model
        was_training = model.training
        model.eval()
        scores = self.evaluation.text_to_image()
        model.train(was_training)
        self.points.append({"step": state.global_step, "seconds": round(self.seconds, 1), **scores})
        self.resumed = time.perf_counter()


def scores_of(model, processor, limit: int) -> dict[str, dict[str, float]]:
    """What RL is to raise, and what it must not lower."""
    evaluation = ShapesEvaluation(model, processor, limit, seeds=2)
    return {"text_to_image": evaluation.text_to_image(), "understanding": evaluation.understanding()}


def summary(before: dict, after: dict) -> dict[str, float]:
    """Gains in drawing by the lenient rule, and the largest loss in understanding."""
    drawn, redrawn = before["text_to_image"], after["text_to_image"]
    weakest = min(CATEGORIES, key=lambda category: drawn[category])
    kept = ("questions", "caption", "located_caption")
    return {
        "weakest_category": weakest,
        "weakest_category_gain": redrawn[weakest] - drawn[weakest],
        "overall_gain": redrawn["overall"] - drawn["overall"],
        "understanding_drop": max(before["understanding"][k] - after["understanding"][k] for k in kept),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--reward", choices=["checker", "reading"], default="checker")
    parser.add_argument("--prefix", type=int, default=5, help="train the first so many scales")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--minutes", type=float, help="stop after so many minutes of training")
    parser.add_argument("--learning_rate", type=float, default=3e-5)
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--groups", type=int, default=8, help="prompts a step")
    parser.add_argument("--num_generations", type=int, default=16)
    parser.add_argument("--likelihood", default="guided_truncated")
    parser.add_argument("--limit", type=int, default=100, help="cases of each category before and after")
    parser.add_argument("--curve_every", type=int, default=25, help="steps between points of the curve")
    parser.add_argument("--curve_limit", type=int, default=20, help="prompts of each category at each point")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    model = NextFlowForConditionalGeneration.from_pretrained(arguments.checkpoint)
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    num_scales = len(model.config.vq_config.scales)
    sampling = exploring(model.default_image_sampling, arguments.prefix, num_scales)
    reward = shapes_reward
    if arguments.reward == "reading":
        # A reader that does not learn cannot come to agree with what is drawn.
        reward = reading_reward(copy.deepcopy(model).eval(), processor, ask_about_shapes)
    args = NextFlowGRPOConfig(
        output_dir=arguments.output_dir,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        beta=arguments.beta,
        per_device_train_batch_size=arguments.groups * arguments.num_generations,
        num_generations=arguments.num_generations,
        num_prefix_scales=arguments.prefix,
        likelihood=arguments.likelihood,
        image_sampling=sampling.to_dict(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_steps=100,
        save_total_limit=2,
        seed=arguments.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        report_to=[],
    )
    curve = Curve(model, processor, arguments.curve_every, arguments.curve_limit, arguments.minutes)
    grids = PictureGrids(processor, [{"prompt": p} for p in training_prompts(6, seed=1)["prompt"]], every=50)
    trainer = NextFlowGRPOTrainer(
        model,
        reward,
        args,
        train_dataset=training_prompts(6000, arguments.seed),
        processing_class=processor,
        callbacks=[curve, grids],
    )
    before = scores_of(model, processor, arguments.limit)
    trainer.train()
    after = scores_of(model, processor, arguments.limit)
    trainer.save_model()
    processor.save_pretrained(arguments.output_dir)

    values = summary(before, after) | {"before": before, "after": after, "curve": curve.points}
    values |= {"settings": vars(arguments), "log": trainer.state.log_history}
    for name, value in summary(before, after).items():
        print(f"{name:<24} {value if isinstance(value, str) else round(value, 4)}")
    print("written:", write_result(Path(arguments.output_dir) / "rl.json", values))


if __name__ == "__main__":
    main()
