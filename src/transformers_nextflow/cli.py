"""`transformers-nextflow`: draw, edit, video, describe, score and evaluate from the command line."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from PIL import Image

from .evaluation.suites import SUITES
from .utils.atomic_files import write_anyway, write_whole
from .utils.image_files import regular_file
from .utils.one_line_errors import DEBUG, end_on_termination, errors_in_one_line
from .utils.output_files import check_output_file, check_output_folder
from .utils.short_repr import short_path
from .utils.version import __version__


if TYPE_CHECKING:
    import torch

    from .pipeline_nextflow import NextFlowPipeline


app = typer.Typer(
    help="NextFlow: images from text, and text from images.",
    invoke_without_command=True,
    add_completion=False,
    # A traceback of a defect is for reading as it is: no boxes, no values of variables.
    pretty_exceptions_enable=False,
)

# Of an image that is enlarged for viewing: a quarter of a gigabyte.
MOST_PIXELS = 2**26
VIDEO_EXTENSIONS = (".gif", ".mp4")
DTYPES = ("auto", "float32", "bfloat16", "float16")

MODEL = "TRANSFORMERS_NEXTFLOW_MODEL"
# Where a clone has the bundled checkpoint.
BUNDLED = Path("checkpoints", "nextflow-shapes")
TOUR = """\
transformers-nextflow {version}: text and images in one transformer that draws scale by scale.

  generate "a red circle"                          an image from a prompt
  edit "make it blue" --image nextflow.png         another one from it; --mask for a region of it
  vary "a blue circle" --image edited.png          variations: what is coarse is kept
  video "a red circle. it turns blue" --num-frames 3
  describe nextflow.png --question "what is where?"

Each takes --model FOLDER, a folder or a repository of the Hub. {model}
`transformers-nextflow --help` lists all commands, `transformers-nextflow COMMAND --help` what one takes.
"""


def default_model() -> str | None:
    """The model of commands that name none: that of the environment, or the bundled one in a clone."""
    return os.environ.get(MODEL) or (str(BUNDLED) if (BUNDLED / "config.json").is_file() else None)


def _named_model(model: str | None) -> str:
    if model is None:
        raise typer.BadParameter(
            f"name a model: a folder, or a repository of the Hub. Without --model it is the one that {MODEL} names, or "
            f"{BUNDLED} in a clone of the repository."
        )
    return model


Model = Annotated[
    str,
    typer.Option(
        default_factory=default_model,
        callback=_named_model,
        show_default=False,
        help=f"Folder of a model or a pipeline, or a repository of the Hub; default: {MODEL}, or {BUNDLED}.",
    ),
]
Device = Annotated[str | None, typer.Option(help="Device, as cpu or cuda:0; default: a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the weights are stored.")]


Output = Annotated[Path, typer.Option(help="Where the image goes; several are numbered.")]
GuidanceScale = Annotated[float | None, typer.Option(help="1 is none; default: the checkpoint's own.")]
NumImages = Annotated[int, typer.Option(help="Images for each prompt.")]
NumCandidates = Annotated[int, typer.Option(help="Drawn for each image that is kept, the best one.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32, help="Of the first image; the next ones count on from it.")]
Scale = Annotated[int, typer.Option(min=1, help="Enlarge each pixel so many times, for viewing.")]
Pixels = Annotated[int | None, typer.Option(help="Pixels; default: the input image's, or the model's largest square.")]


def _show_version(asked: bool):
    if asked:
        typer.echo(f"transformers-nextflow {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help=f"Show tracebacks, as {DEBUG}=1 does.")] = False,
    provenance: Annotated[
        bool, typer.Option(help="Write into each image's file what drew it: checkpoint, version, seed, settings.")
    ] = True,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
):
    if debug:
        os.environ[DEBUG] = "1"
    context.obj = provenance
    # What a model or a file's name holds may be no text in the terminal's encoding.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if context.invoked_subcommand is None:
        model = default_model()
        typer.echo(TOUR.format(version=__version__, model=f"Here it is {model}." if model else ""), nl=False)


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One image is drawn for each prompt.")],
    model: Model,
    output: Output = Path("nextflow.png"),
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    height: Pixels = None,
    width: Pixels = None,
    guidance_scale: GuidanceScale = None,
    think: Annotated[bool, typer.Option(help="Write a reasoning first, and draw from it.")] = False,
    thought_temperature: Annotated[
        float, typer.Option(min=0, help="Above 0, images of one prompt are thought out differently.")
    ] = 0.0,
    num_images: NumImages = 1,
    num_candidates: NumCandidates = 1,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    previews: Annotated[Path | None, typer.Option(help="Folder for the images after each scale.")] = None,
    scale: Scale = 1,
):
    """Draw an image for each prompt, all of them in one batch."""
    with errors_in_one_line():
        _check_image_path(output, len(prompts) * num_images)
        if previews is not None:
            check_output_folder(previews)
        pipeline = _load_pipeline(model, device, dtype)
        _check_enlarged(pipeline, scale, height, width)
        stages: list[list[Image.Image]] = []

        def keep_preview(pipeline, step, scale, callback_kwargs):
            stages.append(callback_kwargs["preview"])

        start = time.perf_counter()
        drawn = pipeline(
            prompts,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            guidance_scale=guidance_scale,
            think=think,
            thought_temperature=thought_temperature,
            num_images_per_prompt=num_images,
            num_candidates=num_candidates,
            generator=_generators(pipeline, seed, len(prompts) * num_images * num_candidates),
            callback_on_step_end=keep_preview if previews else None,
            callback_on_step_end_tensor_inputs=["preview"] if previews else [],
        )
        seconds = time.perf_counter() - start

        paths = _save(drawn.images, output, scale)
        for number, stage in enumerate(stages, start=1):
            paths += _save(stage, previews / f"{output.stem}-scale-{number}{output.suffix}", scale)
    for thought in drawn.thoughts or []:
        typer.echo(f"Thought: {thought}")
    _tell(seconds, paths)


@app.command()
def edit(
    instruction: Annotated[str, typer.Argument(help="What is to be done; with several images, with them.")],
    images: Annotated[list[Path], typer.Option("--image", help="The image; several may be given, in order.")],
    model: Model,
    output: Output = Path("edited.png"),
    mask: Annotated[Path | None, typer.Option(help="An image that is light where is to be drawn.")] = None,
    paste_back: Annotated[bool, typer.Option(help="Put the image's own pixels back outside of the mask.")] = False,
    guidance_scale: GuidanceScale = None,
    image_guidance_scale: Annotated[float | None, typer.Option(help="Towards the images; 1 is none.")] = None,
    height: Pixels = None,
    width: Pixels = None,
    num_images: NumImages = 1,
    num_candidates: NumCandidates = 1,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    scale: Scale = 1,
):
    """Edit an image, inside a mask or as a whole; or draw from several images."""
    with errors_in_one_line():
        _check_image_path(output, num_images)
        _check_files(images + ([mask] if mask else []))
        pipeline = _load_pipeline(model, device, dtype)
        _check_enlarged(pipeline, scale, height, width)
        start = time.perf_counter()
        drawn = pipeline(
            instruction,
            image=[str(path) for path in images],
            mask_image=str(mask) if mask else None,
            paste_back=paste_back,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            height=height,
            width=width,
            num_images_per_prompt=num_images,
            num_candidates=num_candidates,
            generator=_generators(pipeline, seed, num_images * num_candidates),
        )
        seconds = time.perf_counter() - start
        paths = _save(drawn.images, output, scale)
    _tell(seconds, paths)


@app.command()
def vary(
    prompt: Annotated[str, typer.Argument(help="What the image shows.")],
    image: Annotated[Path, typer.Option(help="An image file.")],
    model: Model,
    keep_scales: Annotated[
        int, typer.Option(min=1, help="The first so many scales are kept, the rest is drawn anew: fewer vary more.")
    ] = 1,
    output: Output = Path("varied.png"),
    guidance_scale: GuidanceScale = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest codes; default: the checkpoint's own.")
    ] = None,
    num_images: NumImages = 4,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    scale: Scale = 1,
):
    """Draw variations of an image."""
    with errors_in_one_line():
        _check_image_path(output, num_images)
        _check_files([image])
        pipeline = _load_pipeline(model, device, dtype)
        _check_enlarged(pipeline, scale)
        start = time.perf_counter()
        drawn = pipeline(
            prompt,
            image=str(image),
            num_kept_scales=keep_scales,
            guidance_scale=guidance_scale,
            temperature=temperature,
            num_images_per_prompt=num_images,
            generator=_generators(pipeline, seed, num_images),
        )
        seconds = time.perf_counter() - start
        paths = _save(drawn.images, output, scale)
    _tell(seconds, paths)


@app.command()
def video(
    texts: Annotated[list[str], typer.Argument(help="What the video shows; or one text for each of its frames.")],
    model: Model,
    output: Annotated[Path, typer.Option(help="A .gif, or an .mp4 with the extra `video`.")] = Path("video.gif"),
    num_frames: Annotated[int | None, typer.Option(help="Needed with a single text.")] = None,
    first_frame: Annotated[Path | None, typer.Option(help="An image file from which the video goes on.")] = None,
    guidance_scale: GuidanceScale = None,
    height: Pixels = None,
    width: Pixels = None,
    frames_per_second: Annotated[float, typer.Option(min=0.1)] = 2.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    scale: Scale = 1,
):
    """Draw a video frame by frame."""
    with errors_in_one_line():
        from .video_processing_nextflow import check_video_path, write_frames

        check_video_path(output)
        _check_files([first_frame] if first_frame else [])
        pipeline = _load_pipeline(model, device, dtype)
        _check_enlarged(pipeline, scale, height, width)
        start = time.perf_counter()
        drawn = pipeline.video(
            texts[0] if len(texts) == 1 else [texts],
            image=str(first_frame) if first_frame else None,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            generator=_generators(pipeline, seed, 1),
        )
        seconds = time.perf_counter() - start
        write_frames([_enlarge(frame, scale) for frame in drawn.frames[0]], output, frames_per_second)
    for number, text in enumerate(drawn.transitions[0], start=2):
        typer.echo(f"Frame {number}: {text}")
    _tell(seconds, [output])


@app.command()
def describe(
    images: Annotated[list[Path], typer.Argument(help="Image files, or videos (.gif, .mp4), in order.")],
    model: Model,
    question: Annotated[str | None, typer.Option(help="What is asked; default: a description.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 128,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Describe images or videos, or answer a question about them."""
    with errors_in_one_line():
        _check_files(images)
        pipeline = _load_pipeline(model, device, dtype)
        kinds = ["video" if path.suffix.lower() in VIDEO_EXTENSIONS else "image" for path in images]
        content = [{"type": kind, kind: str(path)} for kind, path in zip(kinds, images)]
        content.append({"type": "text", "text": question or pipeline.processor.caption_request})
        message = {"role": "user", "content": content}
        answer = pipeline.chat([message], max_images=0, max_new_tokens=max_new_tokens, do_sample=False)
    typer.echo("".join(part["text"] for part in answer["content"]).strip())


@app.command()
def score(
    prompt: Annotated[str, typer.Argument(help="What the images should show.")],
    images: Annotated[list[Path], typer.Option("--image", help="An image file; several may be given.")],
    model: Model,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Say how well images fit a prompt, as the model sees it: log-likelihoods in nats."""
    with errors_in_one_line():
        _check_files(images)
        pipeline = _load_pipeline(model, device, dtype)
        scores = pipeline.score([str(path) for path in images], [prompt] * len(images))
    typer.echo("text given image\timage given text\tfile")
    for text, image, path in zip(scores.text_given_image.tolist(), scores.image_given_text.tolist(), images):
        typer.echo(f"{text:.2f}\t{image:.2f}\t{path}")


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a model, or a repository of the Hub.")],
    suite: Annotated[str, typer.Option(help=f"What is scored: {', '.join(SUITES)}.")] = "shapes",
    limit: Annotated[int | None, typer.Option(min=1, help="Cases of each kind at most.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the scores.")] = None,
    sheets: Annotated[Path | None, typer.Option(help="Folder for contact sheets.")] = None,
    device: Device = None,
):
    """Score a checkpoint: suite, category, score."""
    with errors_in_one_line():
        if json_file is not None:
            check_output_file(json_file)
        if sheets is not None:
            check_output_folder(sheets)
        scores = SUITES[suite](checkpoint, limit=limit, seeds=seeds, sheets=sheets, device=device)
        if json_file is not None:
            from .evaluation.results import write_result

            write_result(json_file, scores)
    typer.echo(json.dumps(scores, indent=2))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A file of weights (safetensors, or a pickle of tensors), or a folder.")],
):
    """List the tensors of a file, and how far they are those of a NextFlow."""
    with errors_in_one_line():
        from .conversion.report import report

        typer.echo(report(file))


Source = Annotated[Path, typer.Argument(help="A .jsonl or .parquet file, or a folder; see docs/data.md.")]
OnBadImage = Annotated[str, typer.Option(help="What an image that cannot be read does: stop, or skip its row.")]


@app.command()
def validate_data(
    source: Source,
    model: Annotated[
        str | None, typer.Option(help="Folder of the model or vision tokenizer that codes are for.")
    ] = None,
    on_bad_image: OnBadImage = "stop",
):
    """Check training data: every row, every image, every code."""
    with errors_in_one_line():
        from .data.validation import validate_source

        report = validate_source(source, model, on_bad_image)
    for problem in report.problems + report.skipped_because:
        typer.echo(problem, err=True)
    typer.echo(
        f"{report.rows} rows, {report.images} images, {report.skipped} rows skipped, {report.num_problems} problems"
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
    level: Annotated[int | None, typer.Option(help="Resolution of all images; default: each one's nearest.")] = None,
    top_k: Annotated[int, typer.Option(help="Nearest codes among which self-correction draws.")] = 10,
    token_share: Annotated[float, typer.Option(help="Share of each scale's tokens that are drawn; 0 for none.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    on_bad_image: OnBadImage = "stop",
    device: Annotated[str, typer.Option(help="Of the tokenizer, as cpu or cuda:0.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one size that are encoded at once.")] = 16,
):
    """Encode the images of training data ahead of time: codes to read, and codes to write."""
    with errors_in_one_line():
        from .data.code_extraction import extract_codes

        check_output_folder(output)
        settings = {"shard_size": shard_size, "level": level, "top_k": top_k, "token_share": token_share, "seed": seed}
        settings |= {"batch_size": batch_size, "on_bad_image": on_bad_image}
        totals = extract_codes(source, tokenizer, output, processes, device, **settings)
    typer.echo(
        f"{totals['rows']} rows in {totals['shards']} shards ({totals['found']} were there), "
        f"{totals['skipped']} rows skipped"
    )


@app.command()
def check_codes(output: Annotated[Path, typer.Argument(help="Folder that extract-codes wrote.")]):
    """Check that codes are complete and as they were written."""
    with errors_in_one_line():
        from .data.code_extraction import check_codes

        totals = check_codes(output)
    typer.echo(f"{totals['rows']} rows in {totals['shards']} shards, {totals['skipped']} rows skipped")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe of the package by its name, or a file; see `recipes`.")],
    model: Annotated[str, typer.Option(help="Folder that the stage starts from: `final` of the stage before.")],
    data: Annotated[Path, typer.Option(help="A .jsonl or .parquet file, or a folder; see docs/data.md.")],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints; `final` in it is the outcome.")],
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint of the same training.")] = False,
    changes: Annotated[
        list[str], typer.Option("--set", help="name=value of the recipe or of its arguments; may be repeated.")
    ] = [],  # noqa: B006  (typer copies it)
    profile: Annotated[bool, typer.Option(help="Measure some steps by torch.profiler; see docs/training.md.")] = False,
):
    """Train a stage of the recipe; several processes by `accelerate launch -m transformers_nextflow.cli train …`."""
    with errors_in_one_line():
        try:
            from .trainers.recipes import load_recipe, run_recipe
        except ImportError as error:
            raise ValueError(error) from error
        check_output_folder(output)
        run_recipe(load_recipe(recipe, changes), model, data, output, resume, profile)


@app.command()
def recipes(copy: Annotated[Path | None, typer.Option(help="Folder to which they are copied, to be changed.")] = None):
    """Name the recipes that the package brings, or copy them, with settings of accelerate for many devices."""
    with errors_in_one_line():
        from .trainers.recipes import RECIPES, recipe_names

        if copy is not None:
            if copy.exists():
                raise ValueError(f"{copy} is there already; name a new folder.")
            with write_whole(copy) as partial:
                shutil.copytree(RECIPES, partial, dirs_exist_ok=True)
    typer.echo("\n".join(recipe_names()))


def main():
    """Entry point of the console script."""
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {' '.join(str(message).split())}\n"
    end_on_termination()
    app(prog_name="transformers-nextflow")


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
        raise OSError(f"No model can be loaded from {short_path(model)}: {error}") from error
    context = click.get_current_context(silent=True)
    pipeline.adds_provenance = context is None or context.find_root().obj is not False
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return pipeline.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"Device {device!r} cannot be used: {error}") from error


def _generators(pipeline: NextFlowPipeline, seed: int, count: int) -> list[torch.Generator]:
    import torch

    pipeline.check_batch_size(count)  # before so many generators are made
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def _check_files(paths: list[Path]):
    for path in paths:
        regular_file(path, "video" if path.suffix.lower() in VIDEO_EXTENSIONS else "image")


def _tell(seconds: float, paths: list[Path]):
    typer.echo(f"Drawn in {seconds:.2f} s:")
    typer.echo("\n".join(map(str, paths)))


def _check_image_path(output: Path, count: int):
    """Whether images can be written: asked before the drawing, which would be lost."""
    extension = output.suffix.lower()
    if Image.registered_extensions().get(extension) not in Image.SAVE:
        raise ValueError(f"{short_path(output)} has no extension of an image that can be written; take .png.")
    try:
        # Some formats are known, and cannot be written all the same, or not in colours.
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.registered_extensions()[extension])
    except Exception as error:
        raise ValueError(f"Images cannot be written as {extension} ({error}); take .png.") from error
    for path in _numbered(output, min(count, 100)):
        check_output_file(path)


def _numbered(path: Path, count: int) -> list[Path]:
    """The path of one image, or of several with their numbers before the extension."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]


def _save(images: list[Image.Image], output: Path, scale: int) -> list[Path]:
    """Save every image that can be saved. Raises `OSError` that says where the others are."""
    paths, refused = _numbered(output, len(images)), []
    for image, path in zip(images, paths):
        try:
            write_anyway(path, _enlarge(image, scale).save)
        except OSError as error:
            refused.append(str(error))
    if refused:
        raise OSError(" ".join(refused))
    return paths


def _check_enlarged(pipeline: NextFlowPipeline, scale: int, height: int | None = None, width: int | None = None):
    """Raises `ValueError` for images that would take more memory than an image for viewing should."""
    if scale == 1:
        return
    side = max(pipeline.processor.image_processor.scale_schedules.resolutions)
    pixels = (height or side) * (width or side)
    if pixels * scale**2 > MOST_PIXELS:
        most = max(1, int((MOST_PIXELS / pixels) ** 0.5))
        raise ValueError(
            f"--scale {scale} makes images of more than {MOST_PIXELS} pixels, a quarter of a gigabyte each; "
            f"take {most} at most."
        )


def _enlarge(image: Image.Image, scale: int) -> Image.Image:
    # By repeating pixels, so that none is invented.
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
