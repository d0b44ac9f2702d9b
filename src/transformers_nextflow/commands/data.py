"""Commands on data and weights: inspection, validation, and extraction of codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.one_line_errors import errors_in_one_line
from ..utils.output_files import check_distinct_paths, check_image_format, check_output_file, check_output_folder
from .options import CaptionColumn, EditedImageColumn, ImageColumn, OnBadImage, Source


def inspect(
    file: Annotated[Path, typer.Argument(help="A file of weights (safetensors, or a pickle of tensors), or a folder.")],
    data: Annotated[
        str | None, typer.Option(help="Images on which to test its vision tokenizer: some are reconstructed.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="With --data: file for originals and reconstructions.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="With --data: the largest number of images.")] = 16,
    image_column: ImageColumn = None,
    edited_image_column: EditedImageColumn = None,
):
    """List the tensors of a file and whether a NextFlow has them; or test whether a checkpoint fits images."""
    with errors_in_one_line():
        if data is None:
            if sheet is not None:
                raise ValueError(f"--sheet {sheet} shows the images of --data; give both, or leave it out.")
            from ..conversion.report import report

            typer.echo(report(file))
            return
        from transformers import AutoConfig

        from ..data.columns import Columns
        from ..data.reconstruction_quality import measure_reconstruction, pixels_of
        from ..data.sources import open_rows
        from ..data.vision_tokenizer import load_vision_tokenizer
        from ..evaluation.image_metrics import contact_sheet
        from ..image_processing_nextflow import NextFlowImageProcessor
        from ..utils.atomic_files import write_with_fallback
        from ..utils.folder_parts import load_part

        if sheet is not None:
            check_image_format(sheet)
            check_distinct_paths([("--sheet", sheet)], ("--data", data))
            check_output_file(sheet)
        rows, root = open_rows(data, Columns(image_column, None, edited_image_column), needs_texts=False)
        vq_model = load_vision_tokenizer(file)
        config = vq_model.config
        processor = NextFlowImageProcessor(config.scales, config.patch_size, config.levels)
        stated = getattr(load_part(AutoConfig, "model", file), "trained_on", None) or {}
        quality = measure_reconstruction(vq_model, pixels_of(rows, root, processor, limit), stated.get("lowest_psnr"))
        if sheet is not None:
            write_with_fallback(sheet, contact_sheet(list(zip(*quality.pairs))).save)
    typer.echo(f"In {file} {quality}.")
    if quality.is_sufficient:
        typer.echo("It reconstructs these images well enough: train a LoRA, or the transformer.")
    else:
        typer.echo(
            f"It does not reconstruct these images well enough, below {quality.min_psnr:.0f} dB, and no model on top "
            "of it can draw them better. Train it on them first: transformers-nextflow train tokenizer "
            f"--model {file} --data {data} …"
        )
    if sheet is not None:
        typer.echo(sheet)


def validate_data(
    source: Source,
    model: Annotated[
        str | None, typer.Option(help="Folder of the model, pipeline or vision tokenizer to which codes must belong.")
    ] = None,
    on_bad_image: OnBadImage = "stop",
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    edited_image_column: EditedImageColumn = None,
):
    """Check training data: every row, every image, every code."""
    with errors_in_one_line():
        from ..data.columns import Columns
        from ..data.validation import validate_source

        columns = Columns(image_column, caption_column, edited_image_column)
        report = validate_source(source, model, on_bad_image, columns)
    for problem in report.problems + report.skipped_because:
        typer.echo(problem, err=True)
    typer.echo(
        f"{report.rows} rows, {report.images} images, {report.skipped} rows skipped, {report.num_problems} problems"
    )
    if report.num_problems:
        raise typer.Exit(1)


def extract_codes(
    source: Source,
    tokenizer: Annotated[str, typer.Option(help="Folder of a model, a pipeline or a vision tokenizer.")],
    output: Annotated[str, typer.Option(help="Folder of the shards, or its address; one that exists is completed.")],
    processes: Annotated[int, typer.Option(min=1, help="How many shards are made at once.")] = 1,
    shard_size: Annotated[int, typer.Option(min=1, help="Rows in a shard.")] = 1000,
    level: Annotated[int | None, typer.Option(help="Resolution of all images; default: each one's nearest.")] = None,
    top_k: Annotated[int, typer.Option(help="Nearest codes among which self-correction samples.")] = 10,
    token_share: Annotated[float, typer.Option(help="Share of each scale's tokens to sample; 0 for none.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    on_bad_image: OnBadImage = "stop",
    device: Annotated[str, typer.Option(help="Device of the tokenizer, such as cpu or cuda:0.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one size that are encoded at once.")] = 16,
    engine: Annotated[
        str, typer.Option(help="local: processes of this machine; ray: actors of a Ray cluster.")
    ] = "local",
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    edited_image_column: EditedImageColumn = None,
):
    """Encode the images of training data before training: codes to read, and codes to predict."""
    with errors_in_one_line():
        from ..data.code_extraction import extract_codes
        from ..data.stores import is_address, without_file_scheme

        place = without_file_scheme(output)
        if not is_address(place):
            check_distinct_paths(
                [("--output", place)], ("the data", without_file_scheme(source)), ("--tokenizer", tokenizer)
            )
            check_output_folder(place)
        settings = {"shard_size": shard_size, "level": level, "top_k": top_k, "token_share": token_share, "seed": seed}
        settings |= {"batch_size": batch_size, "on_bad_image": on_bad_image, "image_column": image_column}
        settings |= {"caption_column": caption_column, "edited_image_column": edited_image_column}
        totals = extract_codes(source, tokenizer, output, processes, device, engine, **settings)
    typer.echo(
        f"{totals['rows']} rows in {totals['shards']} shards ({totals['found']} were there), "
        f"{totals['skipped']} rows skipped"
    )


def check_codes(output: Annotated[str, typer.Argument(help="Folder that extract-codes wrote, or its address.")]):
    """Check that codes are complete and as they were written."""
    with errors_in_one_line():
        from ..data.code_extraction import check_codes

        totals = check_codes(output)
    typer.echo(f"{totals['rows']} rows in {totals['shards']} shards, {totals['skipped']} rows skipped")
