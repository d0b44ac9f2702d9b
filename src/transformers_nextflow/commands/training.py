"""Commands that create a model and train it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..evaluation.suites import SUITES
from ..utils.atomic_files import atomic_write
from ..utils.one_line_errors import errors_in_one_line, note_on_interrupt
from ..utils.output_files import check_distinct_paths, check_output_folder
from .options import CaptionColumn, Data, Device, EditedImageColumn, ImageColumn


def init(
    data: Data,
    output: Annotated[Path, typer.Option(help="A new folder: config, processor, random weights, recipes.")],
    preset: Annotated[
        str, typer.Option(help="The largest size: tiny (to try), small (two cores), base (a GPU).")
    ] = "small",
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    edited_image_column: EditedImageColumn = None,
):
    """Create a model of your own: schedule, tokenizer, sizes and recipes that fit your data and this machine."""
    with errors_in_one_line():
        from ..data.columns import Columns
        from ..trainers.new_model import create_model

        if output.exists():
            raise ValueError(f"{output} already exists; name a new folder.")
        check_output_folder(output)
        columns = Columns(image_column, caption_column, edited_image_column)
        choices = create_model(data, output, preset, columns, seed)
    for choice in choices:
        typer.echo(f"- {choice}")
    typer.echo(
        f"Then: transformers-nextflow train tokenizer --model {output} --data {data} --output runs/tokenizer\n"
        f"      transformers-nextflow train --model runs/tokenizer/final --data {data} --output runs/model"
    )


def train(
    model: Annotated[str, typer.Option(help="Model or pipeline to start from, such as `final` of the one before.")],
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder for checkpoints; `final` in it is the result.")],
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe of the model or of the package by its name, or a file; see `recipes`."),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters; the default recipe is then lora.")] = False,
    rl: Annotated[bool, typer.Option("--rl", help="Train on rewards of drawn images, with the recipe rl.")] = False,
    reward: Annotated[str | None, typer.Option(help="With --rl: reading, shapes, or file.py:function.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the newest checkpoint of the same training.")] = False,
    changes: Annotated[
        list[str], typer.Option("--set", help="name=value of the recipe or of its arguments; may be repeated.")
    ] = [],  # noqa: B006  (typer copies it)
    streaming: Annotated[bool, typer.Option("--streaming", help="Read tables while training.")] = False,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    edited_image_column: EditedImageColumn = None,
    profile: Annotated[bool, typer.Option(help="Profile some steps with torch; see docs/training.md.")] = False,
):
    """Train with a recipe; in several processes with `accelerate launch -m transformers_nextflow.cli train …`."""
    with errors_in_one_line():
        from ..trainers.recipes import load_recipe, run_recipe

        check_distinct_paths([("--output", output)], ("--model", model), ("--data", data))
        check_output_folder(output)
        name = recipe or ("rl" if rl else "lora" if lora else "transformer")
        given = {"image_column": image_column, "caption_column": caption_column, "reward": reward}
        given |= {"edited_image_column": edited_image_column, "streaming": streaming or None}
        asked = load_recipe(name, changes, model, **given)
        if rl and asked.kind != "rl":
            raise ValueError(f"The recipe {name} is of the kind {asked.kind!r}; --rl takes one of the kind 'rl'.")
        if lora and not asked.lora_rank:
            asked = load_recipe(name, changes, model, **given, lora_rank=16)
            if not asked.lora_rank:
                raise ValueError("--lora trains adapters, and lora_rank=0 has none; leave out one of the two.")
        run_recipe(asked, model, data, output, resume, profile)
    if int(os.environ.get("RANK", 0)) == 0:
        typer.echo(output / "final")


def evaluate_run(
    run: Annotated[Path, typer.Argument(help="Folder of a training, which holds its checkpoints.")],
    suite: Annotated[str, typer.Option(help=f"The suite of scores: {', '.join(SUITES)}.")] = "shapes",
    output: Annotated[Path | None, typer.Option(help="Folder for scores; default: evaluation/SUITE in RUN.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The largest number of cases of each kind.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 4,
    every: Annotated[float, typer.Option(min=1, max=86400, help="Seconds between checks for new checkpoints.")] = 60,
    once: Annotated[bool, typer.Option("--once", help="Score the existing checkpoints and do not wait.")] = False,
    device: Device = None,
):
    """Score the checkpoints of a training while it runs, until it is finished: scores, sheets, a curve."""
    with errors_in_one_line():
        from ..trainers.runs.scored_checkpoints import CheckpointScores

        evaluator = CheckpointScores(run, suite, output, limit, seeds, device)
        if once:
            evaluator.check_has_checkpoints()
        with note_on_interrupt(evaluator.progress_note):
            for step in evaluator.update() if once else evaluator.watch(every):
                typer.echo(evaluator.output / f"checkpoint-{step}")


def recipes(copy: Annotated[Path | None, typer.Option(help="Folder to which they are copied, to be changed.")] = None):
    """List the package's recipes, or copy them with settings of accelerate for many devices."""
    with errors_in_one_line():
        from ..trainers.recipes import RECIPES, recipe_names

        if copy is not None:
            check_output_folder(copy)
            if copy.exists():
                raise ValueError(f"{copy} already exists; name a new folder.")
            with atomic_write(copy) as partial:
                shutil.copytree(RECIPES, partial, dirs_exist_ok=True)
    typer.echo("\n".join(recipe_names()))
