"""Options that several commands have."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer


MODEL = "TRANSFORMERS_NEXTFLOW_MODEL"
# The bundled checkpoints in a clone: one that draws and describes, and one that also edits and draws videos.
BUNDLED, BUNDLED_EDITING = Path("checkpoints", "nextflow-emoji"), Path("checkpoints", "nextflow-shapes")
MODEL_HELP = "Folder of a model or a pipeline, or a repository of the Hub; default: {variable}, or {bundled}."


def default_model(bundled: Path = BUNDLED) -> str | None:
    """The default model of commands: that of the environment variable, or a bundled one in a clone."""
    is_there = any((bundled / name).is_file() for name in ("config.json", "model_index.json"))
    return os.environ.get(MODEL) or (str(bundled) if is_there else None)


def named_model(model: str | None) -> str:
    """Raises `typer.BadParameter` if there is no default model."""
    if model is None:
        raise typer.BadParameter(
            f"name a model: a folder, or a repository of the Hub. Without one it is the one that {MODEL} names, or "
            f"one of {BUNDLED.parent} in a clone of the repository."
        )
    return model


def model_settings(bundled: Path = BUNDLED) -> dict:
    """Settings of an option or an argument that names a model; `bundled` is its default in a clone."""
    return {
        "default_factory": partial(default_model, bundled),
        "callback": named_model,
        "show_default": False,
        "help": MODEL_HELP.format(variable=MODEL, bundled=bundled),
    }


Model = Annotated[str, typer.Option(**model_settings())]
EditingModel = Annotated[str, typer.Option(**model_settings(BUNDLED_EDITING))]

Source = Annotated[
    str,
    typer.Argument(help="A .jsonl, .parquet or .tar file, a folder, or a data set of the Hub; see docs/data.md."),
]
Data = Annotated[str, typer.Option(help="As in validate-data: a file, a folder, or a data set of the Hub.")]
OnBadImage = Annotated[str, typer.Option(help="What an image that cannot be read does: stop, or skip its row.")]
ImageColumn = Annotated[
    str | None,
    typer.Option("--image-column", "--image_column", help="Column of the images; default: found by its name."),
]
CaptionColumn = Annotated[
    str | None,
    typer.Option("--caption-column", "--caption_column", help="Column of the captions, or of the instructions."),
]
EditedImageColumn = Annotated[
    str | None,
    typer.Option(
        "--edited-image-column", "--edited_image_column", help="Column of edited images, which makes rows edits."
    ),
]
Device = Annotated[str | None, typer.Option(help="Device, as cpu or cuda:0; default: a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the weights are stored.")]
