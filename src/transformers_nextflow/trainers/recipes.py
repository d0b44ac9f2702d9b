"""Stages of the paper's training as files: what is trained, at which level, with which arguments (`recipes/`)."""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoProcessor, Trainer

from ..data.rows import open_rows
from ..data.vision_tokenizer import load_vision_tokenizer
from ..image_processing_nextflow import NextFlowImageProcessorPil
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQModel
from ..utils.atomic_files import write_whole
from ..utils.checkpoint_checks import loading_errors
from ..utils.known_names import check_names
from ..utils.one_line_errors import tells_what_is_kept
from ..utils.short_repr import short_path, short_repr
from ..utils.typed_values import check_types, hints_of, is_of_type, read_typed
from .collator import NextFlowCollator
from .diffusion.arguments import NextFlowDiffusionTrainingArguments
from .nextflow_trainer import NextFlowTrainer, NextFlowTrainingArguments
from .profiling import ProfiledSteps
from .recipe_data import StageImages, StageRows
from .tokenizer.stages import STAGES
from .tokenizer.vq_trainer import NextFlowVQTrainer, NextFlowVQTrainingArguments


RECIPES = Path(__file__).parents[1] / "recipes"
KINDS = {
    "transformer": NextFlowTrainingArguments,
    "tokenizer": NextFlowVQTrainingArguments,
    "diffusion_decoder": NextFlowDiffusionTrainingArguments,
}
PARTS = ("visual_embedding", "heads", "text_embedding", "backbone")


@dataclass(frozen=True)
class Recipe:
    """A stage.

    Args:
        kind: of what is trained, one of `KINDS`.
        arguments: of `NextFlowTrainingArguments`, `NextFlowVQTrainingArguments` or
            `NextFlowDiffusionTrainingArguments`.
        train: which of `PARTS` of the transformer are trained; the others rest. The vision tokenizer always rests.
        level: resolution of all images; `None` leaves the transformer's rows as they are.
        caption_share: share of the drawings that are turned round into captions (paper, section 3.2).
        empty_share: share of the rows answered by an image alone whose prompt is left empty, for guidance. The two
            shares come to 1 at most.
        decoder_width: the tokenizer's pixel decoder starts anew, so many times as wide; 1 keeps it.
        decoder: what a diffusion decoder begins from and is made of, see `diffusion.from_recipe.make_decoder`.
        attention: implementation of the transformer's attention, such as "eager", which is faster than fused kernels in
            the backward pass of small models on CPUs; `None` for transformers' own choice.
    """

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    train: tuple[str, ...] = PARTS
    level: int | None = None
    caption_share: float = 0.0
    empty_share: float = 0.0
    decoder_width: int = 1
    decoder: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {tuple(KINDS)}, got {self.kind!r}.")
        known = KINDS[self.kind]
        check_names(self.arguments, [f.name for f in fields(known) if f.init], f"{known.__name__}, or arguments,")
        check_types(self.arguments, hints_of(known), "arguments")
        if unknown := sorted(set(self.train) - set(PARTS)):
            raise ValueError(f"train names parts of {PARTS}, got {unknown}.")
        shares = (self.caption_share, self.empty_share, self.caption_share + self.empty_share)
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"caption_share and empty_share must lie in [0, 1], with their sum, got {self.caption_share} and "
                f"{self.empty_share}."
            )
        if self.kind != "transformer" and self.level is None:
            raise ValueError(f"A {self.kind}'s recipe needs the level (resolution) of its images.")
        if self.decoder and self.kind != "diffusion_decoder":
            raise ValueError(f"decoder is of the kind diffusion_decoder, and this recipe is of the kind {self.kind}.")


def recipe_names() -> list[str]:
    """Of the recipes that the package brings."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_file(recipe: str | os.PathLike) -> Path:
    """A file as it is, or the one of a recipe that the package brings. Raises `ValueError` for neither."""
    if os.path.isfile(recipe):
        return Path(recipe)
    if str(recipe) not in recipe_names():
        raise ValueError(f"{short_path(recipe)} is neither a file nor a recipe; there are {', '.join(recipe_names())}.")
    return RECIPES / f"{recipe}.yaml"


def load_recipe(recipe: str | os.PathLike, changes: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe by its file or name, with `name=value` changes: of its own fields, else of its `arguments`.

    Raises:
        ValueError: for what is no recipe, a name that it does not know, or a change that is no `name=value`.
    """
    path = recipe_file(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no recipe, since it is no text in UTF-8: {error}.") from error
    values = _from_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no recipe; it must hold `kind` and `arguments`.")
    if values.get("arguments") is None:
        values["arguments"] = {}
    for change in changes:
        name, separator, value = change.partition("=")
        if not separator:
            raise ValueError(f"A change is written name=value, got {short_repr(change)}.")
        target = values if name in {f.name for f in fields(Recipe)} else values["arguments"]
        if not isinstance(target, dict):
            break  # refused below
        target[name] = _from_yaml(value, f"The change {short_repr(change)}")
    if isinstance(values["arguments"], dict) and (known := KINDS.get(str(values.get("kind")))):
        hints = hints_of(known)
        values["arguments"] = {name: _number(value, hints.get(name)) for name, value in values["arguments"].items()}
    return read_typed(Recipe, values, str(path))


def _number(value: Any, hint: Any) -> Any:
    # YAML takes 1e-4, without a point, for a text.
    if isinstance(value, str) and is_of_type(0.5, hint) and not is_of_type(value, hint):
        try:
            return float(value)
        except ValueError:
            pass  # told with its name
    return value


def _from_yaml(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{what} is no YAML: {error}") from error


def train_only(model: NextFlowForConditionalGeneration, parts: tuple[str, ...]):
    """Leaves trainable the named ones of `PARTS`.

    Heads that are tied to the text embeddings are the same matrix: each part that is named trains it.
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


def make_trainer(
    recipe: Recipe, model: str | os.PathLike, data: str | os.PathLike, output: str | os.PathLike
) -> Trainer:
    """The trainer of a stage.

    Args:
        model: folder of what the stage starts from, as the stage before it wrote it.
        data: see `open_rows`.
        output: folder of checkpoints and logs.

    Raises:
        ValueError: for arguments that the trainer does not know, or data that do not fit.
    """
    makers = {
        "transformer": _transformer_trainer, "tokenizer": _tokenizer_trainer, "diffusion_decoder": _decoder_trainer
    }  # fmt: skip
    return makers[recipe.kind](recipe, model, data, output)


def run_recipe(recipe: Recipe, model, data, output, resume: bool = False, profile: bool = False):
    """Train a stage and write `output/final`, from which the next one starts.

    Args:
        resume: from the newest checkpoint.
        profile: measure some steps and write them to `output/profile`, see [`ProfiledSteps`].
    """
    trainer = make_trainer(recipe, model, data, output)
    if profile:
        trainer.add_callback(ProfiledSteps(Path(output) / "profile"))
    with tells_what_is_kept(lambda: _newest(trainer)):
        trainer.train(resume_from_checkpoint=resume or None)
    final = Path(output) / "final"
    # All processes take part, but only some write.
    with write_whole(final) if trainer.args.should_save else nullcontext(final) as folder:
        trainer.save_model(str(folder))


def _newest(trainer) -> str:
    checkpoint = trainer.last_checkpoint()
    if checkpoint is None:
        return "No checkpoint had been written."
    return f"The newest checkpoint is {checkpoint}; the same command with --resume goes on from it."


def _transformer_trainer(recipe: Recipe, folder, data, output) -> NextFlowTrainer:
    args = NextFlowTrainingArguments(output_dir=str(output), **recipe.arguments)
    model = NextFlowForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=recipe.attention
    )
    train_only(model, recipe.train)
    with loading_errors(folder):
        processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.level = recipe.level
    source, root = open_rows(data)
    rows = StageRows(source, processor, recipe.level, recipe.caption_share, recipe.empty_share, args.seed)
    collator = NextFlowCollator(processor, root=root)
    return NextFlowTrainer(model, args, train_dataset=rows, data_collator=collator, processing_class=processor)


def _tokenizer_trainer(recipe: Recipe, folder, data, output) -> NextFlowVQTrainer:
    args = NextFlowVQTrainingArguments(output_dir=str(output), **recipe.arguments)
    model = load_vision_tokenizer(folder)
    teacher = Teacher(model) if STAGES[args.stage].learns_codes else None
    if recipe.decoder_width != 1:
        model = with_wider_decoder(model, recipe.decoder_width)
    source, root = open_rows(data)
    config = model.config
    processor = NextFlowImageProcessorPil(config.scales, config.patch_size, config.levels)
    images = StageImages(source, root, processor, recipe.level)
    return NextFlowVQTrainer(model, args, train_dataset=images, teacher=teacher)


def _decoder_trainer(recipe: Recipe, folder, data, output) -> Trainer:
    try:
        from .diffusion.from_recipe import decoder_trainer
    except ImportError as error:
        raise ImportError(
            "A diffusion decoder needs diffusers: pip install transformers-nextflow[pipelines]"
        ) from error
    return decoder_trainer(recipe, folder, data, output)


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
