"""Train the emoji world's vision tokenizer, a stage at a time, by the recipes in `recipes`.

    python train_tokenizer.py recipes/tokenizer_64.yaml --output runs/emoji/tokenizer-64
    python train_tokenizer.py recipes/tokenizer_decoder.yaml --output runs/emoji/tokenizer \
        --model runs/emoji/tokenizer-128/final --judge runs/emoji/judge-2

The semantic decoder learns to name the concept that covers each cell, by cross-entropy to fixed random directions, in
place of a teacher's features. The decoder stage sees through a judge's layers (perceptual loss) and a discriminator.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sizes import SEMANTIC_DIM, SIZES, tokenizer_config, world_of
from torch import nn
from torch.utils.data import Dataset

from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.trainers import NextFlowVQTrainer, NextFlowVQTrainingArguments, PatchDiscriminator
from transformers_nextflow.trainers.recipes import load_recipe
from transformers_nextflow.utils.atomic_files import atomic_write
from transformers_nextflow.worlds.emoji import World, cell_labels, random_scene, render
from transformers_nextflow.worlds.emoji.judge import Judge
from transformers_nextflow.worlds.emoji.scene import SQUARE


HELD_OUT_SEED = 1_000_000
EVALUATED = 256
READOUT_SCALE, READOUT_WEIGHT = 16.0, 0.3
STICKER_WEIGHT = 2.0  # cells of the background are many, and say little
L1_WEIGHT, GRADIENT_WEIGHT = 0.2, 0.2


class EmojiImages(Dataset):
    """Image i of a seed, always the same, with what covers its cells. All concepts, styles and colours are in them.

    The first `square` are square; of the rest whole batches of `batch_size` have one ratio.
    """

    def __init__(self, world: World, length: int, seed: int, batch_size: int = 1, square: int = 0):
        self.world, self.length, self.seed = world, length, seed
        self.batch_size, self.square = batch_size, square

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if index >= self.length:
            raise IndexError(index)
        scene = random_scene(np.random.default_rng((self.seed, index)), self.world)
        scene = replace(scene, ratio=self._ratio(index))
        return {
            "pixel_values": torch.from_numpy(render(scene, self.world)).permute(2, 0, 1) / 127.5 - 1,
            "concepts": torch.from_numpy(cell_labels(scene, self.world)),
        }

    def _ratio(self, index: int):
        if index < self.square or len(self.world.ratios) == 1:
            return SQUARE
        # Half of the batches are square.
        drawn = np.random.default_rng((self.seed, index // self.batch_size, 1)).integers(2 * len(self.world.ratios))
        return self.world.ratios[drawn] if drawn < len(self.world.ratios) else SQUARE


class EmojiVQTrainer(NextFlowVQTrainer):
    """The trainer with this world's semantic loss, and pixels compared by value and by edges."""

    world: World

    @cached_property
    def directions(self) -> torch.Tensor:
        """(D, 1 + concepts) unit columns, always the same: the background's and each concept's."""
        generator = torch.Generator().manual_seed(0)
        columns = torch.randn(SEMANTIC_DIM, 1 + len(self.world.concepts), generator=generator)
        return F.normalize(columns, dim=0).to(self.args.device)

    def semantic_loss(self, output, inputs):
        """Cross-entropy of the concept of each cell: after the decoder, and straight from the latents."""
        latents = output.latents[:, : self._core.config.semantic_code_dim].permute(0, 2, 3, 1)
        # The latents have fewer channels than the decoder has features: their own part of the directions.
        readout = self._named(latents, self.directions[: latents.shape[-1]], inputs["concepts"])
        return self._named(output.semantic_features, self.directions, inputs["concepts"]) + READOUT_WEIGHT * readout

    def _named(self, vectors: torch.Tensor, directions: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        logits = READOUT_SCALE * F.normalize(vectors, dim=-1) @ F.normalize(directions, dim=0)
        weights = 1 + (STICKER_WEIGHT - 1) * (concepts > 0)
        losses = F.cross_entropy(logits.movedim(-1, 1), concepts, reduction="none")
        return (losses * weights).sum() / weights.sum()

    def pixel_loss(self, output, inputs):
        drawn, true = output.reconstruction, inputs["pixel_values"]
        edges = sum(
            (drawn.diff(dim=side) - true.diff(dim=side)).abs().mean() for side in (-2, -1)
        )  # what keeps small faces from washing out
        return F.mse_loss(drawn, true) + L1_WEIGHT * F.l1_loss(drawn, true) + GRADIENT_WEIGHT * edges


class JudgePerceptual(nn.Module):
    """How far two images (B, 3, H, W) lie apart in the layers of a judge, each layer's maps at unit length: (B,)."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = judge.eval().requires_grad_(False)

    def forward(self, drawn: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        self.judge.to(drawn.device)
        pairs = zip(self.judge.features(drawn), self.judge.features(true))
        return sum((F.normalize(a) - F.normalize(b)).square().sum(1).mean((1, 2)) for a, b in pairs)


def make_trainer(arguments: argparse.Namespace) -> EmojiVQTrainer:
    size, recipe = SIZES[arguments.size], load_recipe(arguments.recipe, arguments.changes)
    args = NextFlowVQTrainingArguments(
        output_dir=str(arguments.output),
        train_sampling_strategy="sequential",  # images are random by themselves, and batches have one ratio
        report_to=[],
        **recipe.arguments,
    )
    torch.manual_seed(args.seed)
    if arguments.model:
        model = NextFlowVQModel.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        model = NextFlowVQModel(tokenizer_config(size))
    world = world_of(size, arguments.art, recipe.level)
    images = EmojiImages(world, 100_000_000, args.seed, args.per_device_train_batch_size, square=args.kmeans_images)
    extras = {}
    if args.perceptual_weight:
        extras["perceptual"] = JudgePerceptual(Judge.load(arguments.judge))
    if args.adversarial_weight:
        extras["discriminator"] = PatchDiscriminator(layers=2)
    trainer = EmojiVQTrainer(
        model,
        args,
        images,
        eval_dataset=EmojiImages(world, EVALUATED, HELD_OUT_SEED, square=EVALUATED),
        **extras,
    )
    trainer.world = world
    return trainer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a file of recipes of the kind tokenizer")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--art", type=Path, default=Path("runs/emoji/art.zip"))
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints, and of the outcome, `final`")
    parser.add_argument("--model", help="the stage before: its `final`")
    parser.add_argument("--judge", type=Path, help="folder of the judge whose layers the decoder stage looks through")
    parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="name=value of the recipe")
    arguments = parser.parse_args()
    trainer = make_trainer(arguments)
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    if trainer.args.eval_strategy != "no":
        print(trainer.evaluate())
    if trainer.args.should_save:
        with atomic_write(arguments.output / "final") as folder:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)


if __name__ == "__main__":
    main()
