"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer


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
