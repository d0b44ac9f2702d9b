"""`transformers-nextflow`: draw, describe and evaluate from the command line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image


if TYPE_CHECKING:
    from .pipeline_nextflow import NextFlowPipeline


app = typer.Typer(
    help="NextFlow: pictures from text, and text from pictures.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback of a defect is for reading as it is: no boxes, no values of variables.
    pretty_exceptions_enable=False,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")

Model = Annotated[str, typer.Option(help="Folder of a model or a pipeline, or a repository of the Hub.")]
Device = Annotated[str | None, typer.Option(help="Device, as cpu or cuda:0; default: a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the weights are stored.")]


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One picture is drawn for each prompt.")],
    model: Model,
    output: Annotated[Path, typer.Option(help="Where the picture goes; several are numbered.")] = Path("nextflow.png"),
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the model's largest square.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: the model's largest square.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is none; default: the checkpoint's own.")] = None,
    num_images: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count on from it.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    previews: Annotated[Path | None, typer.Option(help="Folder for the pictures after each scale.")] = None,
    scale: Annotated[int, typer.Option(min=1, help="Enlarge each pixel so many times, for viewing.")] = 1,
):
    """Draw a picture for each prompt, all of them in one batch."""
    with _errors_in_one_line():
        _check_extension(output)
        pipeline = _load_pipeline(model, device, dtype)
        import torch

        stages: list[list[Image.Image]] = []

        def keep_preview(pipeline, step, scale, callback_kwargs):
            stages.append(callback_kwargs["preview"])

        start = time.perf_counter()
        images = pipeline(
            prompts,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts) * num_images)],
            callback_on_step_end=keep_preview if previews else None,
            callback_on_step_end_tensor_inputs=["preview"] if previews else [],
        ).images
        seconds = time.perf_counter() - start

        paths = _save(images, output, scale)
        for number, stage in enumerate(stages, start=1):
            paths += _save(stage, previews / f"{output.stem}-scale-{number}{output.suffix}", scale)
    typer.echo(f"Drawn in {seconds:.2f} s:")
    typer.echo("\n".join(map(str, paths)))


@app.command()
def describe(
    image: Annotated[Path, typer.Argument(help="A picture file.")],
    model: Model,
    question: Annotated[str, typer.Option(help="What is asked about the picture.")] = "describe the picture.",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 128,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Describe a picture, or answer a question about it."""
    with _errors_in_one_line():
        if not image.is_file():
            raise FileNotFoundError(f"There is no picture file {image}.")
        pipeline = _load_pipeline(model, device, dtype)
        processor = pipeline.processor
        content = [{"type": "image", "image": str(image)}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(pipeline.device)
        output = pipeline.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    typer.echo(answer.strip())


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a model, or a repository of the Hub.")],
    suite: Annotated[str, typer.Option(help="What is scored: shapes.")] = "shapes",
    limit: Annotated[int | None, typer.Option(min=1, help="Cases of each kind at most.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures for each prompt.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the scores.")] = None,
    sheets: Annotated[Path | None, typer.Option(help="Folder for contact sheets.")] = None,
):
    """Score a checkpoint: suite, category, score."""
    with _errors_in_one_line():
        if suite != "shapes":
            raise ValueError(f"There is no suite {suite!r}; there is: shapes.")
        from .evaluation.shapes_evaluation import evaluate_shapes

        scores = evaluate_shapes(checkpoint, limit=limit, seeds=seeds, sheets=sheets)
        if json_file is not None:
            from .evaluation.results import write_result

            write_result(json_file, scores)
    typer.echo(json.dumps(scores, indent=2))


Source = Annotated[Path, typer.Argument(help="A .jsonl or .parquet file, or a folder; see docs/data.md.")]
OnBadPicture = Annotated[str, typer.Option(help="What a picture that cannot be read does: stop, or skip its row.")]


@app.command()
def validate_data(
    source: Source,
    model: Annotated[
        str | None, typer.Option(help="Folder of the model or vision tokenizer that codes are for.")
    ] = None,
    on_bad_picture: OnBadPicture = "stop",
):
    """Check training data: every row, every picture, every code."""
    with _errors_in_one_line():
        from .data.validation import validate_source

        report = validate_source(source, model, on_bad_picture)
    for problem in report.problems + report.skipped_because:
        typer.echo(problem, err=True)
    typer.echo(
        f"{report.rows} rows, {report.pictures} pictures, {report.skipped} rows skipped, {report.num_problems} problems"
    )
    if report.num_problems:
        raise typer.Exit(1)


@app.command()
def extract_codes(
    source: Source,
    tokenizer: Annotated[str, typer.Option(help="Folder of a model or a vision tokenizer.")],
    output: Annotated[Path, typer.Option(help="Folder of the shards; an interrupted one is finished.")],
    processes: Annotated[int, typer.Option(min=1, help="How many shards are made at once.")] = 1,
    shard_size: Annotated[int, typer.Option(min=1, help="Rows in a shard.")] = 1000,
    level: Annotated[int | None, typer.Option(help="Resolution of all pictures; default: each one's nearest.")] = None,
    top_k: Annotated[int, typer.Option(help="Nearest codes among which self-correction draws.")] = 10,
    token_share: Annotated[float, typer.Option(help="Share of each scale's tokens that are drawn; 0 for none.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    on_bad_picture: OnBadPicture = "stop",
    device: Annotated[str, typer.Option(help="Of the tokenizer, as cpu or cuda:0.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures of one size that are encoded at once.")] = 16,
):
    """Encode the pictures of training data ahead of time: codes to read, and codes to write."""
    with _errors_in_one_line():
        from .data.code_extraction import extract_codes

        settings = {"shard_size": shard_size, "level": level, "top_k": top_k, "token_share": token_share, "seed": seed}
        settings |= {"batch_size": batch_size, "on_bad_picture": on_bad_picture}
        totals = extract_codes(source, tokenizer, output, processes, device, **settings)
    typer.echo(
        f"{totals['rows']} rows in {totals['shards']} shards ({totals['found']} were there), "
        f"{totals['skipped']} rows skipped"
    )


@app.command()
def check_codes(output: Annotated[Path, typer.Argument(help="Folder that extract-codes wrote.")]):
    """Check that codes are complete and as they were written."""
    with _errors_in_one_line():
        from .data.code_extraction import check_codes

        totals = check_codes(output)
    typer.echo(f"{totals['rows']} rows in {totals['shards']} shards, {totals['skipped']} rows skipped")


def main():
    """Entry point of the console script."""
    app(prog_name="transformers-nextflow")


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """What the user can mend is told in a line on stderr, with exit code 2; a defect keeps its traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(2) from error


def _load_pipeline(model: str, device: str | None, dtype: str) -> NextFlowPipeline:
    import torch
    from transformers.utils import logging

    try:
        from .pipeline_nextflow import NextFlowPipeline
    except ImportError as error:
        raise ValueError(error) from error

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}.")
    logging.disable_progress_bar()
    try:
        pipeline = NextFlowPipeline.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise OSError(f"No model can be loaded from {model}: {error}") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return pipeline.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"Device {device!r} cannot be used: {error}") from error


def _check_extension(output: Path):
    # Asked before the drawing: it would be lost.
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{output} has no extension of a picture that can be written; take .png.")


def _save(images: list[Image.Image], path: Path, scale: int) -> list[Path]:
    """Save one picture as `path`, several with their number before the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path] if len(images) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(len(images))]
    for image, target in zip(images, paths):
        # Enlarged by repeating pixels, so that none is invented.
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(target)
    return paths


if __name__ == "__main__":
    main()
