"""Codebooks: dual or single

In the paper (section 2.1, figure 8), a single-branch VQGAN reconstructs images a little better than the dual codebook
(0.5 dB of PSNR at 256 pixels), but gives a much worse generator: a higher vision loss, and a lower GenEval at equal
steps.

Here each arm trains a tokenizer, with the schedule and the losses of the shapes recipe in a smaller and shorter form,
and then a transformer on its codes. "Dual" has the recipe's 64 semantic and 16 pixel channels, and a semantic decoder
that learns what each cell holds. "Single" is the nearest that the tokenizer's configuration allows: only its 78 pixel
channels choose a code, it has no semantic loss, and its two semantic channels stay at zero. The linear probe is the
accuracy with which a linear map predicts shape and colour of the objects from the codes that the transformer reads. The
losses of codes belong to two different codebooks, so comparing them says little.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from experiment import Ablation, Claim
from jobs import Budget, Cache, Point
from shapes_recipe import KMEANS_SHARES, ShapesImages, ShapesVQTrainer, tokenizer_config
from training import BATCH_SIZE, QUIET, TEXT_WORLD, WORLD, rows_of, train_small_model, training_exchanges
from transformers import PrinterCallback

from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.evaluation.image_metrics import psnr
from transformers_nextflow.trainers.tokenizer.vq_trainer import NextFlowVQTrainingArguments
from transformers_nextflow.worlds.shapes import random_scene
from transformers_nextflow.worlds.shapes.tokenizer_suite import SEED, linear_probe, pixels_of


SMALLER = {"pixel_channels": 96, "pixel_decoder_channels": 128}
SINGLE = {
    "semantic_code_dim": 2,
    "pixel_code_dim": 78,
    "semantic_distance_weight": 0.0,
    "pixel_distance_weight": 1.0,
}
LEARNING_RATE = 2e-3
# Images of one object from which k-means starts the codebooks, for each step of the budget.
KMEANS_IMAGES = 16
# Images among which the training chooses, so many that hardly any of k-means' is among the chosen.
IMAGES = 10_000_000
# Scenes on which the linear map is fitted and tested, for each prompt of the budget.
FITTED, TESTED = 50, 15


class OnlyPixels(ShapesVQTrainer):
    def semantic_loss(self, output, inputs):
        return output.reconstruction.new_zeros(())


def new_tokenizer(dual: bool, seed: int) -> NextFlowVQModel:
    config = tokenizer_config()
    for name, value in (SMALLER if dual else SMALLER | SINGLE).items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = NextFlowVQModel(config)
    # As in the recipe, the features of a cell need not say where the cell is.
    model.semantic_encoder.get_submodule("embeddings.position_embedding").weight.data.zero_()
    if not dual:
        # The loss has no gradient for them, so they stay at zero.
        model.semantic_projection[-1].weight.data.zero_()
        model.semantic_projection[-1].bias.data.zero_()
    return model


def train_tokenizer(model: NextFlowVQModel, dual: bool, seed: int, budget: Budget):
    """Train all parts without codes for the budget's steps, then codebooks and decoders for half as many."""
    images = KMEANS_IMAGES * budget.steps
    for stage, steps, rate in (("joint", budget.steps, 1.0), ("codebook", max(1, budget.steps // 2), 0.5)):
        with TemporaryDirectory() as folder:
            args = NextFlowVQTrainingArguments(
                output_dir=folder,
                stage=stage,
                autoencoder_share=1.0,
                max_steps=steps,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=rate * LEARNING_RATE,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 10,
                adam_beta2=0.95,
                weight_decay=0.01,
                kmeans_images=images,
                kmeans_shares=KMEANS_SHARES,
                seed=seed,
                **QUIET,
            )
            trainer = (ShapesVQTrainer if dual else OnlyPixels)(model, args, ShapesImages(IMAGES, seed, single=images))
            trainer.remove_callback(PrinterCallback)  # the command shows a bar of its own
            trainer.train()
    model.eval()


@torch.no_grad()
def tokenizer_scores(model: NextFlowVQModel, budget: Budget) -> dict[str, float]:
    """Returns `psnr` in dB on held-out scenes, and `probe`, the mean accuracy of shape and colour."""
    rng = np.random.default_rng(SEED)
    counts = [count * budget.prompts for count in (FITTED, TESTED)]
    parts = [[random_scene(rng, TEXT_WORLD, allow_held_out=True) for _ in range(count)] for count in counts]
    coded = [(scenes, model.encode(pixels_of(scenes, TEXT_WORLD)).image_tokens) for scenes in parts]
    (_, (tested, tokens)) = coded
    pixels = pixels_of(tested, TEXT_WORLD)
    schedule = model.schedule_of(pixels)
    restored = model.decode(tokens, schedule)
    probe = linear_probe(model, TEXT_WORLD, schedule.num_scales - 1, *coded)
    return {
        "psnr": float(psnr((restored + 1) / 2, (pixels + 1) / 2).mean()),
        "probe": float(np.mean(list(probe.values()))),
    }


def run(seed: int, budget: Budget, cache: Cache, dual: bool) -> list[Point]:
    def make(folder: Path):
        model = new_tokenizer(dual, seed)
        train_tokenizer(model, dual, seed, budget)
        model.save_pretrained(folder)

    settings = {"dual": dual, "seed": seed, "steps": budget.steps}
    vq_model = NextFlowVQModel.from_pretrained(cache.folder("tokenizers", settings, make)).eval()
    rows = rows_of(training_exchanges(WORLD, BATCH_SIZE * budget.steps), vq_model, WORLD)
    curve = train_small_model(vq_model, rows, seed, budget)
    curve[-1] |= tokenizer_scores(vq_model, budget)
    return curve


ABLATION = Ablation(
    name="codebooks",
    arms={"dual": {"dual": True}, "single": {"dual": False}},
    run=run,
    scores={
        "psnr": "PSNR in dB",
        "probe": "linear probe",
        "exact_drawing": "drawn exactly",
        "drawing": "drawn right",
        "code_loss": "loss of a code",
    },
    claims=(Claim("psnr", "dual", "single", "below"), Claim("drawing", "dual", "single", "above")),
    steps=250,
)


if __name__ == "__main__":
    ABLATION.main(__doc__)
