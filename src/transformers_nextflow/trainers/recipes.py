"""Recipes: files that describe trainings, with what is trained, the level and all arguments (`recipes/`)."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from ..data.columns import Columns
from ..data.mixture import check_weights
from ..utils.atomic_files import atomic_write
from ..utils.known_names import check_names
from ..utils.one_line_errors import note_on_interrupt
from ..utils.registry import Registry
from ..utils.short_repr import short_path, short_repr
from ..utils.typed_values import check_types, hints_of, is_of_type, read_typed
from ..utils.unique_names import load_yaml
from .profiling import ProfiledSteps


RECIPES = Path(__file__).parents[1] / "recipes"
# The kinds of recipes, each with its class of arguments.
KINDS = Registry(
    "kind",
    {
        "transformer": "transformers_nextflow.trainers.nextflow_trainer:NextFlowTrainingArguments",
        "tokenizer": "transformers_nextflow.trainers.tokenizer.vq_trainer:NextFlowVQTrainingArguments",
        "rl": "transformers_nextflow.trainers.rl.grpo_config:NextFlowGRPOConfig",
        "diffusion_decoder": "transformers_nextflow.trainers.diffusion.arguments:NextFlowDiffusionTrainingArguments",
    },
)
# The subfolder of a model with recipes that fit it and its data, as `init` writes them.
OWN_RECIPES = "recipes"
PARTS = ("visual_embedding", "heads", "text_embedding", "backbone")
# Fields that only some kinds of training follow.
FIELDS_OF_KINDS = {
    "train": ("transformer", "rl"),
    "attention": ("transformer", "rl"),
    "caption_share": ("transformer",),
    "empty_share": ("transformer",),
    "decoder_width": ("tokenizer",),
    "perceptual": ("tokenizer",),
    "discriminator": ("tokenizer",),
    "levels": ("tokenizer",),
    "cut_square": ("tokenizer",),
    "decoder": ("diffusion_decoder",),
}


@dataclass(frozen=True)
class Recipe:
    """The settings of a training.

    Args:
        kind: one of `KINDS`, which says what is trained; "rl" trains the transformer on rewards of its images.
        arguments: arguments of `NextFlowTrainingArguments`, `NextFlowVQTrainingArguments`, `NextFlowGRPOConfig` or
            `NextFlowDiffusionTrainingArguments`.
        train: which of `PARTS` of the transformer are trained; the others are frozen, as is the vision tokenizer.
        lora_rank: above 0 the backbone is trained by adapters of this rank; what else `train` names, other than the
            text embedding, is fully trained and saved with them. RL with adapters trains nothing else.
        reward: for the kind "rl": a name of `REWARDS`, or "file.py:function".
        level: resolution of all images; `None` leaves the transformer's rows as they are, and is the tokenizer's
            largest.
        levels: for the tokenizer, in place of `level`: each image has one of them, sampled by the seed.
        cut_square: for the tokenizer: whether images are cropped to squares. Otherwise each keeps its aspect ratio, and
            batches have images of one size.
        caption_share: share of the drawings that are turned into captions (paper, section 3.2).
        empty_share: share of the rows answered by only an image whose prompt is left empty, for guidance. The two
            shares add up to at most 1.
        decoder_width: factor by which the tokenizer's pixel decoder is widened and trained anew; 1 keeps it.
        perceptual: for the tokenizer, with a `perceptual_weight` above 0: file or folder with the weights of LPIPS, see
            `load_perceptual`.
        discriminator: for the tokenizer, with an `adversarial_weight` above 0: settings of [`PatchDiscriminator`].
        decoder: the start and the settings of a diffusion decoder, see `diffusion.from_recipe.make_decoder`.
        attention: implementation of the transformer's attention, such as "eager", which is faster than fused kernels in
            the backward pass of small models on CPUs; `None` for transformers' own choice.
        image_column, caption_column, edited_image_column: columns of the data, see [`Columns`].
        streaming: read tables during training; for the transformer, with `max_steps`.
        mixture: sources and their weights, relative to the folder of the data; for the transformer, with `max_steps`.
            See [`Mixture`].
    """

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    train: tuple[str, ...] = PARTS
    lora_rank: int = 0
    reward: str | None = None
    level: int | None = None
    levels: tuple[int, ...] = ()
    cut_square: bool = True
    caption_share: float = 0.0
    empty_share: float = 0.0
    decoder_width: int = 1
    perceptual: str | None = None
    discriminator: dict[str, int] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    edited_image_column: str | None = None
    streaming: bool = False
    mixture: dict[str, float] | None = None

    def __post_init__(self):
        if self.kind not in tuple(KINDS):
            raise ValueError(f"kind must be one of {tuple(KINDS)}, got {self.kind!r}.")
        known = KINDS[self.kind]
        check_names(self.arguments, [f.name for f in fields(known) if f.init], f"{known.__name__}, or arguments,")
        check_types(self.arguments, hints_of(known), "arguments")
        if unknown := sorted(set(self.train) - set(PARTS)):
            raise ValueError(f"train must name parts of {PARTS}, got {unknown}.")
        shares = (self.caption_share, self.empty_share, self.caption_share + self.empty_share)
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"caption_share and empty_share must lie in [0, 1], with their sum, got {self.caption_share} and "
                f"{self.empty_share}."
            )
        if "output_dir" in self.arguments:
            raise ValueError("output_dir is the folder that the training is given; leave it out of arguments.")
        for name, kinds in FIELDS_OF_KINDS.items():
            own = next(f for f in fields(self) if f.name == name)
            default = own.default_factory() if own.default is MISSING else own.default
            if self.kind not in kinds and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={short_repr(getattr(self, name))} is of the kind {' or '.join(kinds)}, and this recipe is "
                    f"of the kind {self.kind}; leave it out."
                )
        if self.arguments.get("resume_from_checkpoint") is not None:
            raise ValueError("resume_from_checkpoint has no effect in a recipe; call train with --resume.")
        if self.decoder_width < 1:
            raise ValueError(f"decoder_width must be at least 1, got {self.decoder_width}.")
        if self.lora_rank < 0 or (self.lora_rank and self.kind in ("tokenizer", "diffusion_decoder")):
            raise ValueError(
                f"lora_rank is for the transformer, and starts at 1; got {self.lora_rank} for the kind {self.kind!r}."
            )
        if self.levels and self.level is not None:
            raise ValueError(f"Images come at level {self.level} or at the levels {list(self.levels)}; leave out one.")
        if (self.reward is None) == (self.kind == "rl"):
            raise ValueError(f"A reward is for the kind 'rl', which needs one; got {self.reward!r} for {self.kind!r}.")
        if self.streaming and self.kind != "transformer":
            raise ValueError(f"A {self.kind} training needs its rows by number: leave out streaming.")
        if self.mixture is not None:
            check_weights(self.mixture)
            if self.kind != "transformer" or self.arguments.get("max_steps", -1) < 1:
                raise ValueError("A mixture is for the transformer, and has no end: set max_steps.")

    @property
    def columns(self) -> Columns:
        return Columns(self.image_column, self.caption_column, self.edited_image_column)


def recipe_names() -> list[str]:
    """The names of the package's recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_file(recipe: str | os.PathLike, model: str | os.PathLike | None = None) -> Path:
    """The file of a recipe, given as a file or by its name: from the folder `recipes` of a model, or the package's.

    Raises:
        ValueError: if there is none.
    """
    if os.path.isfile(recipe):
        return Path(recipe)
    if model is not None and os.path.isfile(own := Path(model) / OWN_RECIPES / f"{recipe}.yaml"):
        return own
    if str(recipe) not in recipe_names():
        raise ValueError(f"{short_path(recipe)} is neither a file nor a recipe; there are {', '.join(recipe_names())}.")
    return RECIPES / f"{recipe}.yaml"


def load_recipe(
    recipe: str | os.PathLike,
    changes: list[str] | tuple[str, ...] = (),
    model: str | os.PathLike | None = None,
    **given,
) -> Recipe:
    """A recipe by its file or name, with `name=value` changes: of its own fields, else of its `arguments`.

    Args:
        model: a model, whose own recipes are preferred to the package's.
        given: values of fields, which are set before the changes; `None` keeps the recipe's value.

    Raises:
        ValueError: for an invalid recipe, an unknown name, or a change that is no `name=value`.
    """
    path = recipe_file(recipe, model)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a recipe, since it is not UTF-8 text: {error}.") from error
    values = _from_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe; it must hold `kind` and `arguments`.")
    values |= {name: value for name, value in given.items() if value is not None}
    if values.get("arguments") is None:
        values["arguments"] = {}
    for change in changes:
        name, separator, value = change.partition("=")
        if not separator:
            raise ValueError(f"A change must be written name=value, got {short_repr(change)}.")
        target = values if name in {f.name for f in fields(Recipe)} else values["arguments"]
        if not isinstance(target, dict):
            break  # an error follows below
        target[name] = _from_yaml(value, f"The change {short_repr(change)}")
    if isinstance(values["arguments"], dict) and values.get("kind") in tuple(KINDS):
        values["arguments"] = _parse_numbers(values["arguments"], KINDS[values["kind"]])
    return read_typed(Recipe, _parse_numbers(values, Recipe), str(path))


def _parse_numbers(values: dict[str, Any], kind: type) -> dict[str, Any]:
    hints = hints_of(kind)
    return {name: _number(value, hints.get(name)) for name, value in values.items()}


def _number(value: Any, hint: Any) -> Any:
    # YAML takes 1e-4, without a point, for a text.
    if isinstance(value, dict):
        inner = next((get_args(one)[1] for one in (hint, *get_args(hint)) if get_origin(one) is dict), None)
        return {name: _number(entry, inner) for name, entry in value.items()}
    if isinstance(value, str) and is_of_type(0.5, hint) and not is_of_type(value, hint):
        try:
            return float(value)
        except ValueError:
            pass  # an error with its name follows
    return value


def _from_yaml(text: str, what: str) -> Any:
    try:
        return load_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{what} is not valid YAML: {error}") from error


def run_recipe(recipe: Recipe, model, data, output, resume: bool = False, profile: bool = False):
    """Run a recipe and write `output/final`, from which the next one starts.

    Args:
        model, data, output: as in `make_trainer`.
        resume: continue from the newest checkpoint.
        profile: measure some steps and write them to `output/profile`, see [`ProfiledSteps`].
    """
    from .recipe_trainers import make_trainer, save_result

    trainer = make_trainer(recipe, model, data, output)
    if profile:
        trainer.add_callback(ProfiledSteps(Path(output) / "profile"))
    with note_on_interrupt(lambda: _newest_checkpoint(trainer)):
        trainer.train(resume_from_checkpoint=resume or None)
    final = Path(output) / "final"
    # All processes must take part in saving, but only some write.
    with atomic_write(final) if trainer.args.should_save else nullcontext(final) as folder:
        save_result(trainer, recipe, model, folder)
        if trainer.args.should_save and (own := Path(model) / OWN_RECIPES).is_dir():
            shutil.copytree(own, Path(folder) / OWN_RECIPES)


def _newest_checkpoint(trainer) -> str:
    checkpoint = trainer.last_checkpoint()
    if checkpoint is None:
        return "No checkpoint had been written."
    return f"The newest checkpoint is {checkpoint}; the same command with --resume continues from it."
