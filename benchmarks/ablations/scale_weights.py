"""Weights of the scales when the resolution grows

In the paper (section 3.1, figure 11), a token of an h x w grid has the weight (h·w)^-alpha in the loss, with alpha =
0.9. Without these weights (alpha = 0), coarse scales became worse on the way from 256 to 512 pixels, and GenEval fell
from 0.67 to 0.57.

Here a model is first trained on images of 64 pixels (41 codes in 8 scales) with alpha = 0.9. It is then trained on
images of 128 pixels, where objects of the same size lie on 8 x 8 cells (169 codes in 10 scales), with either alpha and
from the same weights. The tokenizer is the shapes one. K-means adds codes for the larger images; nothing else in it
changes. At step 0 of the curves the model that was trained on small images draws large ones. "Drawn right" (GenEval's
rule) ignores what else an image holds, so its curve starts high; "drawn exactly" starts at 0.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from experiment import Ablation, Claim
from jobs import Budget, Cache, Point
from shapes_recipe import make_processor
from training import (
    BATCH_SIZE,
    CHECKPOINT,
    WORLD,
    bundled_tokenizer,
    held_out_exchanges,
    rows_of,
    small_model,
    train,
    training_exchanges,
)

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor, NextFlowVQModel
from transformers_nextflow.trainers.tokenizer.codebook_maintenance import initialize_codebook
from transformers_nextflow.worlds.shapes import World, random_scene
from transformers_nextflow.worlds.shapes.tokenizer_suite import pixels_of


LARGE = World(canvas=128, lattice=8, shapes=WORLD.shapes, colors=WORLD.colors, max_objects=3, held_out_pairs=())
SCALES, LEVELS = [1, 1, 1, 1, 1, 2, 4, 4, 8, 8], [[64, 8], [128, 10]]
# Codes that are added for each scale of the large images, in the recipe's order: background, objects, details.
ADDED = [2, 1152, 2, 2, 2, 200, 150, 150, 100, 100]
# Large images of one object from which k-means finds these codes, for each step of the budget.
KMEANS_IMAGES = 10


def two_level_tokenizer(source: NextFlowVQModel, images: int) -> NextFlowVQModel:
    """Returns the shapes tokenizer on a longer schedule, with codes that k-means finds in large images added to its
    own.
    """
    rng = np.random.default_rng(0)
    pixels = pixels_of([random_scene(rng, LARGE, 1) for _ in range(images)], LARGE)
    state = source.state_dict()
    added = _on_long_schedule(source, sum(ADDED))
    added.load_state_dict({name: w for name, w in state.items() if not name.startswith("quantizer.")}, strict=False)
    initialize_codebook(added, pixels, ADDED)
    for name in (name for name in state if name.startswith("quantizer.")):
        state[name] = torch.cat([state[name], added.state_dict()[name]])
    model = _on_long_schedule(source, source.config.codebook_size + sum(ADDED))
    model.load_state_dict(state)
    return model.eval()


def _on_long_schedule(source: NextFlowVQModel, codebook_size: int) -> NextFlowVQModel:
    config = copy.deepcopy(source.config)
    config.scales, config.levels, config.codebook_size = SCALES, LEVELS, codebook_size
    return NextFlowVQModel(config).eval()


def train_at(
    model: NextFlowForConditionalGeneration, processor: NextFlowProcessor, world: World, seed: int, budget: Budget
) -> list[Point]:
    rows = rows_of(training_exchanges(world, BATCH_SIZE * budget.steps), model.vq_model, world)
    held_out = rows_of(held_out_exchanges(world, budget), model.vq_model, world)
    return train(model, processor, world, rows, held_out, seed, budget)


def run(seed: int, budget: Budget, cache: Cache, alpha: float) -> list[Point]:
    images = KMEANS_IMAGES * budget.steps
    tokenizer = cache.folder(
        "two-level-tokenizers",
        {"images": images},
        lambda folder: two_level_tokenizer(bundled_tokenizer(), images).save_pretrained(folder),
    )
    vq_model = NextFlowVQModel.from_pretrained(tokenizer).eval()
    processor = make_processor(vq_model, tokenizer_of=str(CHECKPOINT))

    def train_on_small_images(folder: Path):
        model = small_model(vq_model, processor, seed)
        train_at(model, processor, WORLD, seed, budget)
        model.save_pretrained(folder)

    settings = {"seed": seed, "steps": budget.steps}
    start = cache.folder("small-images", settings, train_on_small_images)
    model = NextFlowForConditionalGeneration.from_pretrained(start, dtype=torch.float32, attn_implementation="eager")
    model.config.scale_loss_alpha = alpha
    return train_at(model, processor, LARGE, seed, budget)


ABLATION = Ablation(
    name="scale_weights",
    arms={f"alpha {alpha}": {"alpha": alpha} for alpha in (0.0, 0.9)},
    run=run,
    scores={
        "exact_drawing": "drawn exactly",
        "drawing": "drawn right",
        "coarse_loss": "loss of coarse scales",
        "fine_loss": "loss of fine scales",
    },
    claims=(
        Claim("coarse_loss", "alpha 0.0", "alpha 0.9", "above"),
        Claim("drawing", "alpha 0.0", "alpha 0.9", "below"),
    ),
    steps=300,
)


if __name__ == "__main__":
    ABLATION.main(__doc__)
