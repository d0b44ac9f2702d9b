"""The vision tokenizer that a recipe trains, its images, and what judges its reconstructions."""

from __future__ import annotations

import copy
import os

import torch
from torch import nn

from ...data.sources import open_rows
from ...data.vision_tokenizer import load_vision_tokenizer
from ...image_processing_nextflow import NextFlowImageProcessor
from ...modeling_nextflow_vq import NextFlowVQModel
from ...utils.known_names import check_names
from ..recipe_data import BucketedImages
from .adversarial import PatchDiscriminator
from .perceptual import load_perceptual
from .stages import STAGES
from .vq_trainer import NextFlowVQTrainer, NextFlowVQTrainingArguments


def tokenizer_trainer(recipe, folder: str | os.PathLike, data: str | os.PathLike, output: str | os.PathLike):
    """The trainer of a recipe of kind "tokenizer"; `folder` holds the tokenizer, or a model with one."""
    args = NextFlowVQTrainingArguments(output_dir=str(output), **recipe.arguments)
    judges = loss_networks(recipe, args)
    model = load_vision_tokenizer(folder)
    teacher = Teacher(model) if STAGES[args.stage].learns_codes and args.semantic_weight else None
    if recipe.decoder_width != 1:
        torch.manual_seed(args.seed)  # the new decoder starts at random
        model = with_wider_decoder(model, recipe.decoder_width)
    source, root = open_rows(data, recipe.columns, needs_texts=False)
    config = model.config
    levels = recipe.levels or (recipe.level or config.scale_schedules.resolutions[-1],)
    processor = NextFlowImageProcessor(config.scales, config.patch_size, config.levels)
    images = BucketedImages(source, root, processor, levels, recipe.cut_square, args.seed)
    smallest = min(map(min, images.sizes))
    for name, judge in judges.items():
        if judge.smallest_side > smallest:
            remedy = "set discriminator: {layers: 2}, or fewer" if name == "discriminator" else "leave it out"
            raise ValueError(
                f"Images have sides of {smallest} pixels, and {name} needs at least {judge.smallest_side}; {remedy}."
            )
    return NextFlowVQTrainer(model, args, train_dataset=images, teacher=teacher, **judges)


def loss_networks(recipe, args: NextFlowVQTrainingArguments) -> dict[str, nn.Module]:
    """The perceptual distance and the discriminator that a recipe asks for, by the names of the trainer's arguments.

    Raises:
        ValueError: for a weight without its judge, a judge whose weight is 0, and settings that are not known.
    """
    judges: dict[str, nn.Module] = {}
    if args.perceptual_weight and recipe.perceptual is None:
        raise ValueError(
            f"perceptual_weight {args.perceptual_weight} needs a network: set perceptual to the file or folder of its "
            "weights (docs/tokenizer.md)."
        )
    if recipe.perceptual is not None and not args.perceptual_weight:
        raise ValueError(f"perceptual {recipe.perceptual} has no effect: set perceptual_weight above 0.")
    if recipe.discriminator and not args.adversarial_weight:
        raise ValueError(f"discriminator {recipe.discriminator} has no effect: set adversarial_weight above 0.")
    if recipe.perceptual is not None:
        judges["perceptual"] = load_perceptual(recipe.perceptual)
    if args.adversarial_weight:
        check_names(recipe.discriminator, ["channels", "layers"], "discriminator of a recipe")
        torch.manual_seed(args.seed)  # it starts at random, the same after a break
        judges["discriminator"] = PatchDiscriminator(**recipe.discriminator)
    return judges


class Teacher(nn.Module):
    """The semantic encoder as a stage finds it; pixels (B, 3, H, W) → its features (B, h, w, D).

    Raises:
        ValueError: if the semantic decoder's features are of another size.
    """

    def __init__(self, model: NextFlowVQModel):
        super().__init__()
        own, target = model.config.semantic_config.hidden_size, model.config.semantic_target_dim
        if own != target:
            raise ValueError(
                f"The teacher, the semantic encoder, has {own} features, but semantic_target_dim is {target}."
            )
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.model.to(pixel_values.device)
        return self.model.encode_semantics(pixel_values, self.model.schedule_of(pixel_values).final_grid)


@torch.no_grad()
def with_wider_decoder(model: NextFlowVQModel, factor: int) -> NextFlowVQModel:
    """The same tokenizer with a new pixel decoder, `factor` times as wide (paper, section 2.1)."""
    config = copy.deepcopy(model.config)
    config.pixel_decoder_channels *= factor
    wider = NextFlowVQModel(config)
    kept = {name: weight for name, weight in model.state_dict().items() if not name.startswith("pixel_decoder.")}
    wider.load_state_dict(kept, strict=False)
    return wider
