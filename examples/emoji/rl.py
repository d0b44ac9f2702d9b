"""Train the emoji world by GRPO with a judge of another seed as the reward, with scores of the judge before and after.

    python examples/emoji/train_judge.py --size medium --seed 1 --output runs/emoji/medium/judge-1
    python examples/emoji/rl.py --judge runs/emoji/medium/judge --reward runs/emoji/medium/judge-1

Prompts are captions without held-out parts. The script writes the model to `--output`, sheets of held-out prompts that
are drawn before and after to its folders `before` and `after`, and `RESULTS/emoji_rl.json`, with the gain in scores by
the judge of the suites (`gain`) and by the judge of the reward (`rewarded_gain`). If only the latter rises, the model
exploits the reward.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from transformers_nextflow import ImageSampling, NextFlowPipeline
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.trainers import NextFlowGRPOConfig, NextFlowGRPOTrainer
from transformers_nextflow.worlds.emoji import Art, World, training_case
from transformers_nextflow.worlds.emoji.evaluation import ART, JUDGE, WORLD, EmojiEvaluation
from transformers_nextflow.worlds.emoji.judge import Judge
from transformers_nextflow.worlds.emoji.rewards import judge_reward


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def training_prompts(world: World, count: int, seed: int) -> Dataset:
    """Returns captions with what they ask for."""
    rng = np.random.default_rng((seed, 77))
    cases = [training_case(rng, world, "drawing") for _ in range(count)]
    return Dataset.from_list(
        [{"prompt": case.asked[0], "requirement": case.requirement.to_json()} for case in cases]
    )  # fmt: skip


def exploring(sampling: ImageSampling, num_scales: int) -> ImageSampling:
    """Returns a checkpoint's settings with a temperature above 0 at every scale, as learning needs it."""
    temperatures = [sampling.value_at("temperature", scale, num_scales) for scale in range(num_scales)]
    return replace(sampling, temperature=[t or 1.0 for t in temperatures])


def overall(
    pipe: NextFlowPipeline, world: World, judges: dict[str, Judge], limit: int, sheets: Path
) -> dict[str, float]:
    """Returns the share of held-out prompts that are drawn right, by each judge; writes the drawings to `sheets`."""
    suites = {name: EmojiEvaluation(pipe, world, judge, limit) for name, judge in judges.items()}
    scores = {name: suite.suite("drawing", suite.draw)["overall"] for name, suite in suites.items()}
    sheets.mkdir(parents=True, exist_ok=True)
    suites["judge"].save_sheets(sheets)
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/nextflow-emoji")
    parser.add_argument("--art", type=Path, default=ART)
    parser.add_argument("--judge", type=Path, default=JUDGE, help="folder of the judge that scores")
    parser.add_argument(
        "--reward",
        type=Path,
        default=Path("runs/emoji/judge-1"),
        help="folder of the judge that rewards, of another seed",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/rl"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prefix", type=int, default=5, help="how many of the first scales are trained")
    parser.add_argument("--groups", type=int, default=8, help="prompts in each step")
    parser.add_argument("--num_generations", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--limit", type=int, default=200, help="held-out prompts that are scored before and after")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    judges = {"judge": Judge.load(arguments.judge), "reward": Judge.load(arguments.reward)}
    if judges["judge"].seed == judges["reward"].seed:
        raise ValueError(f"Both judges have seed {judges['judge'].seed}; train the reward's with another --seed.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judges = {name: judge.to(device) for name, judge in judges.items()}
    world = World.load(arguments.judge / WORLD, Art(arguments.art))
    pipe = NextFlowPipeline.from_pretrained(arguments.checkpoint, dtype=torch.float32).to(device)
    model, processor = pipe.model, pipe.processor
    before = overall(pipe, world, judges, arguments.limit, arguments.output / "before")
    num_scales = model.config.vq_config.scale_schedules.build().num_scales
    args = NextFlowGRPOConfig(
        output_dir=str(arguments.output),
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(10, arguments.steps // 2),
        beta=arguments.beta,
        per_device_train_batch_size=arguments.groups * arguments.num_generations,
        num_generations=arguments.num_generations,
        num_prefix_scales=arguments.prefix,
        image_sampling=exploring(model.default_image_sampling, num_scales).to_dict(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        seed=arguments.seed,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        report_to=[],
    )
    prompts = training_prompts(world, arguments.steps * arguments.groups, arguments.seed)
    trainer = NextFlowGRPOTrainer(
        model, judge_reward(judges["reward"]), args, train_dataset=prompts, processing_class=processor
    )
    trainer.train()
    trainer.save_model()
    processor.save_pretrained(arguments.output)
    after = overall(pipe, world, judges, arguments.limit, arguments.output / "after")
    values = {
        "gain": after["judge"] - before["judge"],
        "rewarded_gain": after["reward"] - before["reward"],
        "before": before,
        "after": after,
        "steps": trainer.state.global_step,
        "log": trainer.state.log_history,
    }
    print({name: values[name] for name in ("gain", "rewarded_gain", "before", "after")})
    print("written:", write_result(arguments.results / "emoji_rl.json", values, device))


if __name__ == "__main__":
    main()
