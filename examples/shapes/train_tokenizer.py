"""Train the shapes world's vision tokenizer, in the paper's stages, on two cores.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/shapes/train_tokenizer.py --output_dir runs/tokenizer

The content of every cell is known, so the semantic decoder learns the cells' shapes and colours by cross-entropy in
place of a teacher's features.
"""

from __future__ import annotations

import argparse
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from transformers_nextflow import NextFlowVQConfig, NextFlowVQModel
from transformers_nextflow.trainers.tokenizer.stages import STAGES
from transformers_nextflow.trainers.tokenizer.vq_trainer import NextFlowVQTrainer, NextFlowVQTrainingArguments
from transformers_nextflow.worlds.shapes.scene import World, cell_labels, random_scene, render


WORLD = World()
OBJECT_WEIGHT = 4.0  # cells with an object are few, and captions speak only of them
READOUT_SCALE, READOUT_WEIGHT = 10.0, 0.5
HELD_OUT_SEED = 1_000_000
# First come tokens for the whole image (one for the background, one for each object), then grids of its cells.
SCALES = (1, 1, 1, 1, 1, 2, 4, 4)
KMEANS_SHARES = [2, 1184, 2, 2, 2, 320, 200, 336]
SINGLE_OBJECT_IMAGES = 8192


def tokenizer_config() -> NextFlowVQConfig:
    return NextFlowVQConfig(
        semantic_config={
            "model_type": "siglip_vision_model",
            # Without layers each cell is encoded independently, and codes add up to scenes.
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 0,
            "num_attention_heads": 4,
            "image_size": WORLD.canvas,
            "patch_size": 16,
            "vision_use_head": False,
        },
        patch_size=16,
        scales=SCALES,
        codebook_size=sum(KMEANS_SHARES),
        semantic_code_dim=64,
        pixel_code_dim=16,
        pixel_distance_weight=0.5,
        normalize_codes=False,
        downsample="rotary",
        upsample="rotary",
        pixel_encoder_type="patch",
        pixel_channels=192,
        pixel_num_res_blocks=2,
        pixel_decoder_channels=256,
        pixel_decoder_num_res_blocks=3,
        semantic_decoder_depth=2,
        semantic_decoder_heads=4,
        semantic_decoder_hidden_size=128,
        semantic_target_dim=len(WORLD.shapes) + len(WORLD.colors) + 2 + len(WORLD.backgrounds),
    )


@lru_cache
def fixed_directions(dim: int, count: int) -> torch.Tensor:
    """Returns orthonormal columns (dim, count), always the same."""
    return torch.linalg.qr(torch.randn(dim, count, generator=torch.Generator().manual_seed(0)))[0]


def attribute_loss(logits: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Returns the cross-entropy of the cells' shapes, colours and backgrounds, for logits (B, h, w, classes of all
    three).
    """
    widths = [len(WORLD.shapes) + 1, len(WORLD.colors) + 1, len(WORLD.backgrounds)]
    weights = 1 + (OBJECT_WEIGHT - 1) * (inputs["shapes"] > 0)
    losses = (
        F.cross_entropy(logit.movedim(-1, 1), inputs[name], reduction="none")
        for logit, name in zip(logits.split(widths, dim=-1), ("shapes", "colors", "backgrounds"))
    )
    return (sum(losses) * weights).sum() / weights.sum()


class ShapesImages(Dataset):
    """Images of scenes with all pairs of shape and colour; item i of a seed is always the same.

    The first `single` images hold one object.
    """

    def __init__(self, length: int, seed: int, single: int = 0):
        self.length, self.seed, self.single = length, seed, single

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if index >= self.length:
            raise IndexError(index)
        count = 1 if index < self.single else None
        scene = random_scene(np.random.default_rng((self.seed, index)), WORLD, count, allow_held_out=True)
        labels = cell_labels(scene, WORLD)
        return {
            "pixel_values": torch.from_numpy(render(scene, WORLD)).permute(2, 0, 1) / 127.5 - 1,
            "shapes": torch.from_numpy(labels.shapes),
            "colors": torch.from_numpy(labels.colors),
            "backgrounds": torch.full(labels.shapes.shape, labels.background),
        }


class ShapesVQTrainer(NextFlowVQTrainer):
    def semantic_loss(self, output, inputs):
        """Returns the cross-entropy of the content of each cell, after the decoder and directly from the latents.

        A small transformer can neither read nor write what a linear map cannot read from the codes, so the latents
        learn the content along fixed directions.
        """
        semantic = output.latents[:, : self._core.config.semantic_code_dim].permute(0, 2, 3, 1)
        directions = fixed_directions(semantic.shape[-1], output.semantic_features.shape[-1])
        readout = READOUT_SCALE * F.normalize(semantic, dim=-1) @ directions.to(semantic.device)
        return attribute_loss(output.semantic_features, inputs) + READOUT_WEIGHT * attribute_loss(readout, inputs)

    def pixel_loss(self, output, inputs):
        weights = 1 + (OBJECT_WEIGHT - 1) * (inputs["shapes"] > 0)
        weights = weights[:, None].repeat_interleave(WORLD.cell_size, 2).repeat_interleave(WORLD.cell_size, 3)
        error = (output.reconstruction - inputs["pixel_values"]).square() * weights
        return error.sum() / (3 * weights.sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, nargs=4, default=(100, 600, 450, 900), metavar=tuple(STAGES))
    parser.add_argument("--batch_size", type=int, default=64, help="images of each process in a step")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--model", help="start from this tokenizer; a stage with 0 steps is left out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    if arguments.model:
        model = NextFlowVQModel.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        model = NextFlowVQModel(tokenizer_config())
        # Rotary resampling encodes where a cell lies, so the cell's features need not.
        positions = model.semantic_encoder.get_submodule("embeddings.position_embedding").weight
        positions.data.zero_()
    for stage, steps in zip(STAGES, arguments.steps):
        if steps == 0:
            continue
        args = NextFlowVQTrainingArguments(
            output_dir=str(Path(arguments.output_dir) / stage),
            stage=stage,
            autoencoder_share=1.0,
            max_steps=steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=256,
            learning_rate=arguments.learning_rate if stage == "joint" else arguments.learning_rate / 2,
            ddp_backend="gloo" if "RANK" in os.environ and not torch.cuda.is_available() else None,
            adam_beta2=0.95,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            codebook_weight=1.0,
            kmeans_images=SINGLE_OBJECT_IMAGES,
            kmeans_shares=KMEANS_SHARES,
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=500,
            save_steps=500,
            save_total_limit=1,
            seed=arguments.seed,
            use_cpu=not torch.cuda.is_available(),
            dataloader_num_workers=0,
            ddp_find_unused_parameters=True,
            report_to=[],
        )
        trainer = ShapesVQTrainer(
            model,
            args,
            # The codebooks start from the first images, which hold one object, so that a code stands for an object at a
            # place.
            ShapesImages(10_000_000, arguments.seed, single=SINGLE_OBJECT_IMAGES),
            eval_dataset=ShapesImages(1024, HELD_OUT_SEED),
        )
        trainer.train()
        trainer.save_model()
    model.save_pretrained(Path(arguments.output_dir) / "final")


if __name__ == "__main__":
    main()
