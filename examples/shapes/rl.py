"""Train the first scales on the shapes world by GRPO, with scores before and after.

    python examples/shapes/rl.py --output_dir runs/rl --minutes 20
    python examples/shapes/rl.py --output_dir runs/rl-reading --reward reading
    python examples/shapes/rl.py --output_dir runs/rl-all --prefix 8

The training prompts are captions that are not kept for evaluation; the scores are those of captions that are. All
scores are written to `OUTPUT_DIR/rl.json`, and images drawn during training to `OUTPUT_DIR/image_grids`.
`benchmarks/rl_prefix.py` and `benchmarks/rl_self_reward.py` compare such runs over seeds.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoProcessor, TrainerCallback

from transformers_nextflow import ImageSampling, NextFlowForConditionalGeneration
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.trainers import ImageGrids, NextFlowGRPOConfig, NextFlowGRPOTrainer
from transformers_nextflow.trainers.rl.rewards import reading_reward
from transformers_nextflow.trainers.rl.rollouts import generate_rollouts
from transformers_nextflow.worlds.shapes import CATEGORIES, World, is_reserved
from transformers_nextflow.worlds.shapes.evaluation import ShapesEvaluation
from transformers_nextflow.worlds.shapes.language import draw_category
from transformers_nextflow.worlds.shapes.rewards import ask_about_shapes, shapes_reward


CHECKPOINT = "checkpoints/nextflow-shapes"
WORLD = World()
# The scores of understanding that RL must not lower; `questions` is a mean over seven kinds.
KEPT = ("questions", "caption", "located_caption")
# The number of prompts of each category that show how much the category can teach.
PROBED = 8
WEAKEST_SEED = 1_000_000


def training_prompts(count: int, seed: int, shares: dict[str, float] | None = None) -> Dataset:
    """Makes captions of GenEval's six categories, in turn or by `shares`; none is kept for evaluation."""
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < count:
        category = CATEGORIES[len(rows) % len(CATEGORIES)]
        if shares is not None:
            category = CATEGORIES[rng.choice(len(CATEGORIES), p=[shares[name] for name in CATEGORIES])]
        text, _, _ = draw_category(rng, WORLD, category, places=False)
        if not is_reserved(text):
            rows.append({"prompt": text, "category": category})
    return Dataset.from_list(rows)


def teaching_shares(rewards: torch.Tensor, focus: float) -> dict[str, float]:
    """Returns the share of the prompts of each category.

    A group of equal rewards teaches nothing, so a share `focus` of the prompts goes to the categories in proportion to
    how much the rewards of a prompt's images differ. The rest is divided evenly, so that nothing is forgotten.

    Args:
        rewards: (prompts, images), for prompts of the categories in turn.
    """
    spread = rewards.std(1).unflatten(0, (-1, len(CATEGORIES))).mean(0)
    even = torch.full_like(spread, 1 / len(CATEGORIES))
    shares = (1 - focus) * even + focus * (spread / spread.sum() if spread.any() else even)
    return dict(zip(CATEGORIES, (shares.double() / shares.double().sum()).tolist()))


def probe(model, processor, reward: Callable, sampling: ImageSampling, images: int, seed: int) -> torch.Tensor:
    """Returns rewards (prompts, `images`) of some training prompts of all categories in turn."""
    prompts = training_prompts(PROBED * len(CATEGORIES), seed)["prompt"]
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(images)]
    rollouts, drawn = generate_rollouts(model, processor, rows, sampling, generator=torch.Generator().manual_seed(seed))
    rewards = reward(
        prompts=[row["prompt"] for row in rows],
        completions=drawn,
        completion_ids=[rollout.image_tokens.tolist() for rollout in rollouts],
        image_grids=[rollout.schedule.final_grid for rollout in rollouts],
    )
    return torch.tensor(rewards).unflatten(0, (-1, images))


def weakest_of(rewards: torch.Tensor) -> str:
    """Returns the category that is least often drawn right, from rewards (prompts, images) as `probe` returns them."""
    right = (rewards > 0).float().unflatten(0, (-1, len(CATEGORIES))).mean((0, 2))
    return CATEGORIES[int(right.argmin())]


def exploring(sampling: ImageSampling, num_prefix_scales: int, num_scales: int) -> ImageSampling:
    """Returns a checkpoint's settings with a temperature above 0 at every trained scale, as learning needs it."""
    temperatures = [sampling.value_at("temperature", scale, num_scales) for scale in range(num_scales)]
    least = min(t for t in temperatures if t > 0) if any(temperatures) else 1.0
    trained = [max(t, least) if scale < num_prefix_scales else t for scale, t in enumerate(temperatures)]
    return replace(sampling, temperature=trained)


class Curve(TrainerCallback):
    """Scores drawings during training and ends it after the given minutes, without the time of scoring."""

    def __init__(self, model, processor, every: int, limit: int, minutes: float | None):
        self.evaluation = ShapesEvaluation(model, processor, limit, seeds=1)
        self.every, self.minutes = every, minutes
        self.points: list[dict] = []
        self.seconds, self.resumed = 0.0, time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.score(state)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.resumed
        if self.minutes is not None and self.seconds > 60 * self.minutes:
            control.should_training_stop = True
        if state.global_step % self.every == 0:
            self.score(state)
        self.resumed = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        if self.points[-1]["step"] != state.global_step:
            self.score(state)

    def score(self, state):
        model = self.evaluation.model
        was_training = model.training
        model.eval()
        scores = self.evaluation.text_to_image()
        model.train(was_training)
        self.points.append({"step": state.global_step, "seconds": round(self.seconds, 1), **scores})
        self.resumed = time.perf_counter()


def scores_of(model, processor, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns the scores that RL should raise and those that it must not lower."""
    return {
        "text_to_image": ShapesEvaluation(model, processor, arguments.limit, seeds=2).text_to_image(),
        "understanding": ShapesEvaluation(model, processor, arguments.reading_limit).understanding(),
    }


def start_of(arguments: argparse.Namespace) -> dict:
    """Returns what the scores before training depend on: the weights and the numbers of scored cases."""
    weights = hashlib.sha256((Path(arguments.checkpoint) / "model.safetensors").read_bytes()).hexdigest()
    numbers = ("limit", "reading_limit", "num_generations")
    return {"weights": weights} | {name: getattr(arguments, name) for name in numbers}


def scores_before(arguments: argparse.Namespace) -> dict:
    """Returns the scores of the checkpoint from which runs start, with its `start_of` and `weakest_category`.

    The weakest category is that of training prompts. That of the scored ones would partly be the one with the worst
    luck, and would seem to gain as the luck ends.
    """
    model = NextFlowForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    sampling, images = model.default_image_sampling, arguments.num_generations
    weakest = weakest_of(probe(model.eval(), processor, shapes_reward, sampling, images, WEAKEST_SEED))
    return start_of(arguments) | {"weakest_category": weakest} | scores_of(model, processor, arguments)


def summary(before: dict, after: dict) -> dict[str, float | str]:
    """Returns the gains in drawing by the lenient rule, and the largest loss in understanding."""
    drawn, redrawn, weakest = before["text_to_image"], after["text_to_image"], before["weakest_category"]
    return {
        "weakest_category": weakest,
        "weakest_category_gain": redrawn[weakest] - drawn[weakest],
        "overall_gain": redrawn["overall"] - drawn["overall"],
        "understanding_drop": max(before["understanding"][k] - after["understanding"][k] for k in KEPT),
    }


def run(arguments: argparse.Namespace, before: dict) -> dict:
    """Runs one training; writes `rl.json` and the trained checkpoint to `arguments.output_dir`, and returns the former.

    `before` are the `scores_before` of the checkpoint.
    """
    model = NextFlowForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    num_scales = len(model.config.vq_config.scales)
    sampling = exploring(model.default_image_sampling, arguments.prefix, num_scales)
    reward = shapes_reward
    if arguments.reward == "reading":
        # The reader is a frozen copy, so it cannot learn to agree with wrong images.
        reward = reading_reward(copy.deepcopy(model).eval(), processor, ask_about_shapes)
    rewards = probe(model, processor, reward, sampling, arguments.num_generations, arguments.seed)
    shares = teaching_shares(rewards, arguments.focus)
    args = NextFlowGRPOConfig(
        output_dir=arguments.output_dir,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(10, arguments.steps // 2),
        beta=arguments.beta,
        per_device_train_batch_size=arguments.groups * arguments.num_generations,
        num_generations=arguments.num_generations,
        num_prefix_scales=arguments.prefix,
        likelihood=arguments.likelihood,
        image_sampling=sampling.to_dict(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        seed=arguments.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        report_to=[],
    )
    curve = Curve(model, processor, arguments.curve_every, arguments.curve_limit, arguments.minutes)
    grids = ImageGrids(processor, [{"prompt": p} for p in training_prompts(6, seed=1)["prompt"]], every=50)
    trainer = NextFlowGRPOTrainer(
        model,
        reward,
        args,
        train_dataset=training_prompts(6000, arguments.seed, shares),
        processing_class=processor,
        callbacks=[grids, curve],  # the curve comes last, so that its clock leaves out both
    )
    trainer.train()
    after = scores_of(model, processor, arguments)
    trainer.save_model()
    processor.save_pretrained(arguments.output_dir)

    values = summary(before, after) | {"steps": trainer.state.global_step, "seconds": round(curve.seconds, 1)}
    values |= {"shares": shares, "before": before, "after": after, "curve": curve.points}
    values |= {"settings": vars(arguments), "log": trainer.state.log_history}
    write_result(Path(arguments.output_dir) / "rl.json", values)
    return values


def training_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser for the settings that all runs of a comparison share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=2000, help="largest number of training steps")
    parser.add_argument("--minutes", type=float, help="stop after this many minutes of training")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--groups", type=int, default=8, help="prompts in each step")
    parser.add_argument("--num_generations", type=int, default=16)
    parser.add_argument("--likelihood", default="guided_truncated")
    parser.add_argument(
        "--focus", type=float, default=0.75, help="share of the prompts that goes to categories by how much they teach"
    )
    parser.add_argument(
        "--limit", type=int, default=100, help="prompts of each category that are scored before and after"
    )
    parser.add_argument(
        "--reading_limit", type=int, default=300, help="questions of each kind that are scored before and after"
    )
    parser.add_argument("--curve_every", type=int, default=20, help="steps between points of the curve")
    parser.add_argument("--curve_limit", type=int, default=30, help="prompts of each category at each point")
    return parser


def main():
    parser = training_parser(__doc__)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--reward", choices=["checker", "reading"], default="checker")
    parser.add_argument("--prefix", type=int, default=5, help="how many of the first scales are trained")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    values = run(arguments, scores_before(arguments))
    for name in ("weakest_category", "weakest_category_gain", "overall_gain", "understanding_drop", "steps", "seconds"):
        print(f"{name:<24} {values[name] if isinstance(values[name], str) else round(values[name], 4)}")
    print("written:", Path(arguments.output_dir) / "rl.json")


if __name__ == "__main__":
    main()
