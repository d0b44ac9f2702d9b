"""Train the emoji world's vision tokenizer, a stage at a time, by the recipes in `recipes`.

    python train_tokenizer.py recipes/tokenizer_64.yaml --output runs/emoji/tokenizer-64
    python train_tokenizer.py recipes/tokenizer_decoder.yaml --output runs/emoji/tokenizer \
        --model runs/emoji/tokenizer-128/final --judge runs/emoji/judge-2

In place of a teacher's features, the semantic decoder learns the concept that covers each cell, by cross-entropy with
fixed random directions. The decoder stage has a perceptual loss, which uses the layers of a judge, and a discriminator.
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
STICKER_WEIGHT = 2.0  # there are many cells of the background, and they say little
L1_WEIGHT, GRADIENT_WEIGHT = 0.2, 0.2


class EmojiImages(Dataset):
    """Images of scenes with all concepts, styles and colours, and the concepts of their cells.

    Item i of a seed is always the same. The batches of `batch_size` with the first `square` images are square; of the
    rest, each batch has one ratio.
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
        batch = index // self.batch_size
        if batch * self.batch_size < self.square or len(self.world.ratios) == 1:
            return SQUARE
        # Half of the batches are square.
        drawn = np.random.default_rng((self.seed, batch, 1)).integers(2 * len(self.world.ratios))
        return self.world.ratios[drawn] if drawn < len(self.world.ratios) else SQUARE


class EmojiVQTrainer(NextFlowVQTrainer):
    """The trainer with this world's semantic loss, and a pixel loss that compares values and edges."""

    world: World

    @cached_property
    def directions(self) -> torch.Tensor:
        """Unit columns (D, 1 + concepts) of the background and of each concept, always the same."""
        generator = torch.Generator().manual_seed(0)
        columns = torch.randn(SEMANTIC_DIM, 1 + len(self.world.concepts), generator=generator)
        return F.normalize(columns, dim=0).to(self.args.device)

    def semantic_loss(self, output, inputs):
        """Returns the cross-entropy of the concept of each cell, after the decoder and directly from the latents."""
        latents = output.latents[:, : self._core.config.semantic_code_dim].permute(0, 2, 3, 1)
        # The latents have fewer channels than the decoder has features, so only a part of the directions is used.
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
        )  # keeps small faces sharp
        return F.mse_loss(drawn, true) + L1_WEIGHT * F.l1_loss(drawn, true) + GRADIENT_WEIGHT * edges


class JudgePerceptual(nn.Module):
    """The distance (B,) of images (B, 3, H, W) in the layers of a judge, whose feature vectors have unit length."""

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
        train_sampling_strategy="sequential",  # images are random already, and batches must keep one ratio
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
    parser.add_argument("recipe", type=Path, help="a recipe file of the kind tokenizer")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--art", type=Path, default=Path("runs/emoji/art.zip"))
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints and of the result, `final`")
    parser.add_argument("--model", help="the folder `final` of the stage before")
    parser.add_argument("--judge", type=Path, help="folder of the judge whose layers the perceptual loss uses")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], help="name=value, which changes a setting of the recipe"
    )
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
