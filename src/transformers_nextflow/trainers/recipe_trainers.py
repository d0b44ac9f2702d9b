"""The trainers of recipes, and the results that they write for the next recipe."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoConfig, AutoProcessor, Trainer
from transformers.utils import logging

from ..adapters import lora_config
from ..configuration_nextflow import NextFlowConfig
from ..data.mixture import Mixture, open_source
from ..data.reconstruction_quality import ReconstructionQuality, measure_reconstruction
from ..data.sources import open_rows
from ..data.views import prompt_and_image
from ..evaluation.image_metrics import contact_sheet
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQModel
from ..utils.checkpoint_checks import loading_errors
from ..utils.evaluation_mode import evaluation_mode
from ..utils.folder_parts import load_model, load_part
from ..vision_tokenizer.fingerprint import tokenizer_fingerprint
from .collator import NextFlowCollator
from .nextflow_trainer import NextFlowTrainer, NextFlowTrainingArguments
from .recipe_data import StageRows
from .recipes import Recipe
from .rl.rollouts import generate_rollouts
from .runs.averaged_weights import FOLDER as EMA_FOLDER
from .runs.trained_weights import is_sharded
from .tokenizer.from_recipe import tokenizer_trainer


logger = logging.get_logger(__name__)
# Parts of the transformer that are trained whole beside an adapter, with their modules.
FULLY_TRAINED = {"visual_embedding": ["visual_embedding"], "heads": ["lm_head", "visual_head"]}
# How many images are reconstructed to measure a new tokenizer.
NUM_RECONSTRUCTED = 64
# The numbers of reconstructions, of prompts, and of images for each prompt that cards show.
RECONSTRUCTIONS, SAMPLES = "reconstructions.png", "samples.png"
MAX_SHOWN, MAX_SHOWN_PROMPTS, IMAGES_PER_PROMPT = 12, 4, 4


def make_trainer(
    recipe: Recipe, model: str | os.PathLike, data: str | os.PathLike, output: str | os.PathLike
) -> Trainer:
    """The trainer of a recipe.

    Args:
        model: folder of the model from which the training starts, as the training before wrote it, or of a pipeline.
        data: see `open_rows`; for RL, see `read_prompts`.
        output: folder of checkpoints and logs.

    Raises:
        ValueError: for unknown arguments, or data that do not fit.
    """
    makers = {
        "transformer": _transformer_trainer,
        "tokenizer": tokenizer_trainer,
        "rl": _rl_trainer,
        "diffusion_decoder": _decoder_trainer,
    }
    trainer = makers[recipe.kind](recipe, model, data, output)
    trainer.dataset_name = None if os.path.exists(data) else str(data)
    return trainer


def save_result(trainer: Trainer, recipe: Recipe, start: str | os.PathLike, folder: str | os.PathLike):
    """Write the trained model, with a sheet of samples, or of reconstructions, that its card shows. A tokenizer that
    was taken from a model is written as that model with the new tokenizer; if the codes have changed, its visual
    embedding starts from the new codebooks.
    """
    has_full_model = trainer.args.should_save and not is_sharded(trainer.accelerator.unwrap_model(trainer.model))
    if recipe.kind == "tokenizer" and has_full_model:
        _save_tokenizer(trainer, start, Path(folder))
        return
    trainer.save_model(str(folder))
    if not has_full_model:
        return
    try:
        draw = _draw_decoded if recipe.kind == "diffusion_decoder" else _draw_samples
        draw(trainer, Path(folder))
    except Exception as error:  # the weights are worth more than a sheet
        logger.warning(f"No samples could be drawn for the card: {error}")
    trainer.write_training_card(folder)


def _save_tokenizer(trainer: Trainer, start: str | os.PathLike, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    vq_model, images = trainer.accelerator.unwrap_model(trainer.model), trainer.train_dataset
    shown = range(min(len(images), NUM_RECONSTRUCTED))
    quality = measure_reconstruction(vq_model.eval(), (images[index]["pixel_values"] for index in shown))
    contact_sheet(list(zip(*quality.pairs[:MAX_SHOWN]))).save(folder / RECONSTRUCTIONS)
    trainer.card_images = {RECONSTRUCTIONS: "images of the training above their reconstructions"}
    trainer.card_results = {"psnr": round(quality.mean, 2)}
    with loading_errors(start):
        is_whole = load_part(AutoConfig, "model", start).model_type == NextFlowConfig.model_type
    if not is_whole:
        trainer.save_model(str(folder))
        return
    model = _save_full_model(start, vq_model, quality, folder)
    trainer.write_training_card(folder, model)
    if trainer.args.ema_decay:
        with trainer.averaged_weights():
            averaged = measure_reconstruction(vq_model, (images[index]["pixel_values"] for index in shown))
            _save_full_model(start, vq_model, averaged, folder / EMA_FOLDER)


def _save_full_model(
    start: str | os.PathLike, vq_model: NextFlowVQModel, quality: ReconstructionQuality, folder: Path
) -> NextFlowForConditionalGeneration:
    """Write the model that the tokenizer was taken out of with the tokenizer in it, and its processor."""
    model = with_vision_tokenizer(start, vq_model)
    model.config.trained_on = {
        "domain": "images like those that its vision tokenizer was trained on",
        "lowest_psnr": round(min(quality.psnr), 2),
    }
    model.save_pretrained(folder)
    with loading_errors(start):
        load_part(AutoProcessor, "processor", start).save_pretrained(folder)
    return model


def _draw_samples(trainer: Trainer, folder: Path):
    """A row of images for each of the first prompts that images answer; none if rows are a stream or packed."""
    model, prompts = trainer.accelerator.unwrap_model(trainer.model), _first_prompts(trainer.train_dataset)
    if not prompts:
        return
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(IMAGES_PER_PROMPT)]
    generators = [torch.Generator().manual_seed(seed) for _ in prompts for seed in range(IMAGES_PER_PROMPT)]
    # Each layer would be compiled again for the cache.
    with evaluation_mode(model), torch.compiler.set_stance("force_eager"):
        processor, sampling = trainer.processing_class, base_model.default_image_sampling
        _, images = generate_rollouts(base_model, processor, rows, sampling, generator=generators)
    contact_sheet(
        [images[start : start + IMAGES_PER_PROMPT] for start in range(0, len(images), IMAGES_PER_PROMPT)]
    ).save(folder / SAMPLES)
    trainer.card_prompts = tuple(prompts)
    trainer.card_images = {SAMPLES: f"{IMAGES_PER_PROMPT} images of each of the prompts {', '.join(prompts)}"}


def _draw_decoded(trainer: Trainer, folder: Path):
    from .diffusion.from_recipe import decoder_comparison

    images = [
        trainer.train_dataset[index]["pixel_values"] for index in range(min(len(trainer.train_dataset), MAX_SHOWN))
    ]
    with trainer.averaged_weights():
        contact_sheet(decoder_comparison(trainer, images)).save(folder / RECONSTRUCTIONS)
    trainer.card_images = {RECONSTRUCTIONS: "images of the training; of the pixel decoder; of this one"}


def _first_prompts(rows) -> list[str]:
    """Different prompts in the first rows that only an image answers."""
    found: dict[str, None] = {}
    if not hasattr(rows, "__len__"):
        return []
    for number in range(min(len(rows), NUM_RECONSTRUCTED)):
        row = rows[number]
        if isinstance(row, list):
            return []
        if "prompt" in row:
            parts = [{"type": "text", "text": row["prompt"]}] if not row.get("images") and not row.get("image") else []
        else:
            turns = prompt_and_image(row)
            parts = [] if turns is None else turns[0]
        if [part["type"] for part in parts] == ["text"] and parts[0]["text"]:
            found.setdefault(parts[0]["text"])
        if len(found) == MAX_SHOWN_PROMPTS:
            break
    return list(found)


def with_vision_tokenizer(folder: str | os.PathLike, vq_model: NextFlowVQModel) -> NextFlowForConditionalGeneration:
    """The model of a folder with another tokenizer, whose codebook must have the same size. If its codes differ, the
    visual embedding starts from its codebooks.
    """
    model = load_part(NextFlowForConditionalGeneration, "model", folder, dtype=torch.float32)
    has_other_codes = tokenizer_fingerprint(model.vq_model) != tokenizer_fingerprint(vq_model)
    model.config.vq_config, model.model.vq_model = vq_model.config, vq_model
    if has_other_codes:
        model.load_vision_tokenizer(vq_model)
    return model


def has_new_codes(model: NextFlowForConditionalGeneration) -> bool:
    """Whether the transformer was never trained on its tokenizer's codes: their embedding still equals the codebook, up
    to the rounding to half precision, in which models are converted and saved.
    """
    codes, codebook = model.model.visual_embedding.codes.weight, model.vq_model.quantizer.codebook
    return torch.allclose(codes.float(), codebook.to(codes.device), rtol=2**-8, atol=2**-24)


def train_only(model: NextFlowForConditionalGeneration, parts: tuple[str, ...]):
    """Makes only the named ones of `PARTS` trainable.

    A head that is tied to the text embeddings is the same matrix: naming either part trains it.
    """
    backbone = model.model.language_model
    modules = {
        "visual_embedding": [model.model.visual_embedding],
        "heads": [model.lm_head, model.visual_head],
        "text_embedding": [backbone.embed_tokens],
        "backbone": [backbone.layers, backbone.norm],
    }
    model.requires_grad_(False)
    for part in parts:
        for module in modules[part]:
            module.requires_grad_(True)


def _with_lora(recipe: Recipe, model: NextFlowForConditionalGeneration) -> nn.Module:
    """The model with an adapter around its backbone, and with copies of the parts that are trained whole."""
    config = lora_config(model, recipe.lora_rank)  # its error names the missing package peft
    import peft

    parts = [part for part in recipe.train if part in FULLY_TRAINED]
    if has_new_codes(model) and set(parts) != set(FULLY_TRAINED):
        logger.warning(
            "The transformer was never trained on the codes of its vision tokenizer: their embedding and the heads are "
            "fully trained, and saved with the adapter."
        )
        parts = list(FULLY_TRAINED)
    whole = [name for part in parts for name in FULLY_TRAINED[part]]
    if model.config.tie_word_embeddings and "lm_head" in whole:
        whole.remove("lm_head")  # tied to the text embedding, which is not trained
    if whole:
        config.modules_to_save = whole
    return peft.get_peft_model(model, config)


def _load(recipe: Recipe, folder) -> tuple[NextFlowForConditionalGeneration, object]:
    options = {"dtype": torch.float32, "attn_implementation": recipe.attention}
    model = load_model(NextFlowForConditionalGeneration, folder, **options)
    with loading_errors(folder):
        processor = load_part(AutoProcessor, "processor", folder)
    processor.image_processor.level = recipe.level
    return model, processor


def _transformer_trainer(recipe: Recipe, folder, data, output) -> NextFlowTrainer:
    args = NextFlowTrainingArguments(output_dir=str(output), **recipe.arguments)
    model, processor = _load(recipe, folder)
    if recipe.lora_rank:
        torch.manual_seed(args.seed)  # adapters start from random weights
        model = _with_lora(recipe, model)
    else:
        train_only(model, recipe.train)
    rows, root = _rows_of(recipe, data, processor, args.seed)
    collator = NextFlowCollator(processor, root=root)
    return NextFlowTrainer(model, args, train_dataset=rows, data_collator=collator, processing_class=processor)


def _rows_of(recipe: Recipe, data, processor, seed: int) -> tuple[Dataset | IterableDataset, Path]:
    """The rows of a stage of the transformer, and the folder to which paths of their images are relative."""
    settings = (processor, recipe.level, recipe.caption_share, recipe.empty_share, seed)
    if recipe.mixture is None:
        source, root = open_rows(data, recipe.columns, recipe.streaming)
        rows = StageRows(source, *settings)
        # Files of rows are read as they are asked for anyway, by number.
        return rows.stream() if recipe.streaming and not hasattr(source, "__len__") else rows, root
    folder = Path(data)
    sources = {name: open_source(name, folder, recipe.columns, recipe.streaming) for name in recipe.mixture}
    weighted = [(source, recipe.mixture[name]) for name, source in sources.items()]
    return Mixture(weighted, seed, StageRows((), *settings).stage_row), folder


def _rl_trainer(recipe: Recipe, folder, data, output) -> Trainer:
    from .rl.grpo_config import NextFlowGRPOConfig
    from .rl.grpo_trainer import NextFlowGRPOTrainer
    from .rl.prompt_rows import read_prompts
    from .rl.rewards.named import find_reward

    args = NextFlowGRPOConfig(output_dir=str(output), **recipe.arguments)
    model, processor = _load(recipe, folder)
    reward = find_reward(str(recipe.reward), model, processor)
    if recipe.lora_rank:
        torch.manual_seed(args.seed)
    else:
        train_only(model, recipe.train)
    return NextFlowGRPOTrainer(
        model,
        reward,
        args,
        train_dataset=read_prompts(data, recipe.columns),
        processing_class=processor,
        peft_config=lora_config(model, recipe.lora_rank) if recipe.lora_rank else None,
    )


def _decoder_trainer(recipe: Recipe, folder, data, output) -> Trainer:
    from .diffusion.from_recipe import decoder_trainer  # its error names the missing package diffusers

    return decoder_trainer(recipe, folder, data, output)
