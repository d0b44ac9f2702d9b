"""Train the judge of the emoji world on augmented true renders, with its own seed.

    python examples/emoji/train_judge.py --size small --art runs/emoji/art.zip --output runs/emoji/judge --minutes 4
    python examples/emoji/train_judge.py --size full --output runs/emoji/judge --minutes 6 --workers 14

A judge of another seed is the reward of RL (`--seed 1`), and the tokenizer's decoder stage uses the layers of a third
one for its perceptual loss (`--seed 2`). The script prints the ceilings: how often the judge reads true renders right
on which it was not trained.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from sizes import SIZES, world_of
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from transformers_nextflow.worlds.emoji import World, random_scene, render
from transformers_nextflow.worlds.emoji.art import Art
from transformers_nextflow.worlds.emoji.judge import Judge, Vocabulary, judge_loss, training_looks
from transformers_nextflow.worlds.emoji.reading import reading_scores


SCENES = 48  # scenes of a batch; each gives a look at the whole image and one at every sticker
CEILING_SEED, CEILING_SCENES = 9_000_000, 500
LEARNING_RATE = 2e-3


class Looks(IterableDataset):
    """Yields endless batches of looks at random scenes of the worlds in turn."""

    def __init__(self, worlds: list[World], vocabulary: Vocabulary, seed: int, scenes: int = SCENES):
        self.worlds, self.vocabulary, self.seed, self.scenes = worlds, vocabulary, seed, scenes

    def __iter__(self):
        worker = get_worker_info()
        rng = np.random.default_rng((self.seed, worker.id if worker else 0))
        while True:
            parts = []
            for index in range(self.scenes):
                world = self.worlds[index % len(self.worlds)]
                parts.append(training_looks(rng, random_scene(rng, world), world, self.vocabulary))
            looks, classes = zip(*parts)
            yield torch.cat(looks), {name: torch.cat([one[name] for one in classes]) for name in classes[0]}


def train(judge: Judge, batches: DataLoader, minutes: float, steps: int | None):
    """Trains for the minutes or the steps; the learning rate follows the time, so that it ends at zero."""
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    start = time.perf_counter()
    judge.train()
    for step, (looks, classes) in enumerate(batches):
        spent = (time.perf_counter() - start) / (60 * minutes)
        done = spent if steps is None else step / steps
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done))
        classes = {name: wanted.to(judge.device) for name, wanted in classes.items()}
        loss = judge_loss(judge(looks.to(judge.device)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}, {spent:.0%} of the time, loss {float(loss.detach()):.3f}", flush=True)
    judge.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--art", type=Path, default=Path("runs/emoji/art.zip"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--steps", type=int, help="number of steps, in place of minutes")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    size, art = SIZES[arguments.size], Art(arguments.art)
    worlds = [world_of(size, art, side) for side in size.sides]
    torch.manual_seed(1000 + arguments.seed)
    vocabulary = Vocabulary(worlds[0].concepts, worlds[0].styles)
    judge = Judge(vocabulary, size.judge_width, arguments.seed).to("cuda" if torch.cuda.is_available() else "cpu")
    looks = Looks(worlds, vocabulary, arguments.seed)
    train(judge, DataLoader(looks, batch_size=None, num_workers=arguments.workers), arguments.minutes, arguments.steps)
    judge.save(arguments.output)
    worlds[-1].save(arguments.output / "world.json")

    rng = np.random.default_rng(CEILING_SEED)
    scenes = [random_scene(rng, worlds[-1]) for _ in range(CEILING_SCENES)]
    ceilings = reading_scores(judge, [render(scene, worlds[-1]) for scene in scenes], scenes)
    print(json.dumps({name: round(score, 4) for name, score in ceilings.items()}))


if __name__ == "__main__":
    main()
