"""`transformers-nextflow`: draw, edit, video, describe, score and evaluate from the command line."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from .commands.data import check_codes, extract_codes, inspect, validate_data
from .commands.demo import demo
from .commands.options import BUNDLED_EDITING, Device, Dtype, EditingModel, Model, default_model
from .commands.serving import serve
from .commands.training import evaluate_run, init, recipes, train
from .evaluation.suites import SUITES
from .utils.atomic_files import write_with_fallback
from .utils.image_files import regular_file
from .utils.interrupts import end_on_termination
from .utils.one_line_errors import DEBUG, errors_in_one_line, note_on_interrupt
from .utils.output_files import check_distinct_paths, check_image_format, check_output_file, check_output_folder
from .utils.version import __version__


if TYPE_CHECKING:
    import torch

    from .pipeline_nextflow import NextFlowPipeline


app = typer.Typer(
    help="NextFlow: images from text, and text from images.",
    invoke_without_command=True,
    add_completion=False,
    # Tracebacks of unexpected errors are printed plainly, without boxes and values of variables.
    pretty_exceptions_enable=False,
)

# The limit for an image that is enlarged for viewing: a quarter of a gigabyte.
MAX_PIXELS = 2**26
# How many paths of results are checked before the work; a pipeline draws no more images in a call.
MAX_CHECKED = 1024
# Whether the current command writes into image files what drew them.
ADDS_PROVENANCE = ContextVar("adds_provenance", default=True)
VIDEO_EXTENSIONS = (".gif", ".mp4")

TOUR = """\
transformers-nextflow {version}: text and images in one transformer that draws scale by scale.

  generate "a rocket, 3d style"                    an image from a prompt
  vary "a rocket, 3d style" --image nextflow.png   variations: what is coarse is kept
  describe nextflow.png --question "what is this?"
  video "a red circle. it turns blue" --num-frames 3

`edit` draws another image from one; it takes --mask for a region of it.
Each takes --model FOLDER, a folder or a repository of the Hub. {models}
`transformers-nextflow demo` shows all of it in the browser, `transformers-nextflow --help` lists all commands,
`transformers-nextflow COMMAND --help` what one takes.
"""


Output = Annotated[Path, typer.Option(help="File of the image; several images are numbered.")]
GuidanceScale = Annotated[float | None, typer.Option(help="1 is no guidance; default: the checkpoint's own.")]
NumImages = Annotated[int, typer.Option(help="Images for each prompt.")]
NumCandidates = Annotated[int, typer.Option(help="Candidates drawn for each image; only the best one is kept.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32, help="Seed of the first image; each next image adds 1.")]
Decoder = Annotated[
    str,
    typer.Option(
        help="What decodes codes to pixels: pixel, or the folder or repository of a diffusion decoder, which sharpens; "
        "diffusion is that of a pipeline's folder."
    ),
]
DecoderSteps = Annotated[int | None, typer.Option(min=1, help="Steps of the diffusion decoder; default: its own.")]
Scale = Annotated[int, typer.Option(min=1, help="Factor by which every pixel is enlarged, for viewing.")]
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
    ADDS_PROVENANCE.set(provenance)
    # Texts of a model and names of files may not fit the terminal's encoding.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if context.invoked_subcommand is None:
        models = dict.fromkeys(filter(None, (default_model(), default_model(BUNDLED_EDITING))))
        here = f"Here it is {', and for edit and video '.join(models)}." if models else ""
        typer.echo(TOUR.format(version=__version__, models=here), nl=False)


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One image is drawn for each prompt.")],
    model: Model,
    output: Output = Path("nextflow.png"),
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance steers away from; default: the empty prompt.")
    ] = None,
    height: Pixels = None,
    width: Pixels = None,
    guidance_scale: GuidanceScale = None,
    think: Annotated[bool, typer.Option(help="Write a thought first, and draw from it.")] = False,
    thought_temperature: Annotated[
        float, typer.Option(min=0, help="Above 0 thoughts are sampled, so they differ between images of one prompt.")
    ] = 0.0,
    num_images: NumImages = 1,
    num_candidates: NumCandidates = 1,
    seed: Seed = 0,
    decoder: Decoder = "pixel",
    decoder_steps: DecoderSteps = None,
    device: Device = None,
    dtype: Dtype = "auto",
    previews: Annotated[Path | None, typer.Option(help="Folder for the images after each scale.")] = None,
    scale: Scale = 1,
):
    """Draw an image for each prompt, all of them in one batch."""
    with errors_in_one_line():
        _check_image_path(output, len(prompts) * num_images, ("--previews", previews))
        if previews is not None:
            check_output_folder(previews)
            # The path of the last scale, which has the longest name.
            _check_image_path(_preview(previews, output, 99), len(prompts) * num_images)
        pipeline = _load_pipeline(model, device, dtype, decoder)
        _check_enlarged(pipeline, scale, output, decoder, height, width)
        start = time.perf_counter()
        result = pipeline(
            prompts,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            guidance_scale=guidance_scale,
            think=think,
            thought_temperature=thought_temperature,
            num_images_per_prompt=num_images,
            num_candidates=num_candidates,
            **_decoding(decoder, decoder_steps),
            generator=_generators(pipeline, seed, len(prompts) * num_images * num_candidates),
            preview=previews is not None,
        )
        seconds = time.perf_counter() - start

        paths = _save(result.images, output, scale)
        for number, shown in enumerate(zip(*result.previews or []), start=1):
            paths += _save(shown, _preview(previews, output, number), scale)
    for thought in result.thoughts or []:
        typer.echo(f"Thought: {thought}")
    _print_paths(seconds, paths)


@app.command()
def edit(
    instruction: Annotated[str, typer.Argument(help="What to change in the image, or what to draw from several.")],
    images: Annotated[list[Path], typer.Option("--image", help="The image; several may be given, in order.")],
    model: EditingModel,
    output: Output = Path("edited.png"),
    mask: Annotated[Path | None, typer.Option(help="An image that is light where to draw.")] = None,
    paste_back: Annotated[bool, typer.Option(help="Put the image's own pixels back outside of the mask.")] = False,
    guidance_scale: GuidanceScale = None,
    image_guidance_scale: Annotated[float | None, typer.Option(help="Guidance by the images; 1 is none.")] = None,
    height: Pixels = None,
    width: Pixels = None,
    num_images: NumImages = 1,
    num_candidates: NumCandidates = 1,
    seed: Seed = 0,
    decoder: Decoder = "pixel",
    decoder_steps: DecoderSteps = None,
    device: Device = None,
    dtype: Dtype = "auto",
    scale: Scale = 1,
):
    """Edit an image, inside a mask or as a whole; or draw from several images."""
    with errors_in_one_line():
        _check_image_path(output, num_images, *(("--image", path) for path in images), ("--mask", mask))
        _check_files(images + ([mask] if mask else []))
        pipeline = _load_pipeline(model, device, dtype, decoder)
        _check_enlarged(pipeline, scale, output, decoder, height, width)
        start = time.perf_counter()
        result = pipeline(
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
            **_decoding(decoder, decoder_steps),
            generator=_generators(pipeline, seed, num_images * num_candidates),
        )
        seconds = time.perf_counter() - start
        paths = _save(result.images, output, scale)
    _print_paths(seconds, paths)


@app.command()
def vary(
    prompt: Annotated[str, typer.Argument(help="What the image shows.")],
    image: Annotated[Path, typer.Option(help="An image file.")],
    model: Model,
    keep_scales: Annotated[
        int, typer.Option(min=1, help="How many of the first scales are kept; with fewer, variations differ more.")
    ] = 1,
    output: Output = Path("varied.png"),
    guidance_scale: GuidanceScale = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest codes; default: the checkpoint's own.")
    ] = None,
    num_images: NumImages = 4,
    seed: Seed = 0,
    decoder: Decoder = "pixel",
    decoder_steps: DecoderSteps = None,
    device: Device = None,
    dtype: Dtype = "auto",
    scale: Scale = 1,
):
    """Draw variations of an image."""
    with errors_in_one_line():
        _check_image_path(output, num_images, ("--image", image))
        _check_files([image])
        pipeline = _load_pipeline(model, device, dtype, decoder)
        _check_enlarged(pipeline, scale, output, decoder)
        start = time.perf_counter()
        result = pipeline(
            prompt,
            image=str(image),
            num_kept_scales=keep_scales,
            guidance_scale=guidance_scale,
            temperature=temperature,
            num_images_per_prompt=num_images,
            **_decoding(decoder, decoder_steps),
            generator=_generators(pipeline, seed, num_images),
        )
        seconds = time.perf_counter() - start
        paths = _save(result.images, output, scale)
    _print_paths(seconds, paths)


@app.command()
def video(
    texts: Annotated[list[str], typer.Argument(help="What the video shows; or one text for each of its frames.")],
    model: EditingModel,
    output: Annotated[Path, typer.Option(help="A .gif, or an .mp4 with the extra `video`.")] = Path("video.gif"),
    num_frames: Annotated[int | None, typer.Option(help="Needed with a single text.")] = None,
    first_frame: Annotated[Path | None, typer.Option(help="An image file with which the video begins.")] = None,
    guidance_scale: GuidanceScale = None,
    height: Pixels = None,
    width: Pixels = None,
    frames_per_second: Annotated[float, typer.Option(min=0.1, max=100)] = 2.0,
    seed: Seed = 0,
    decoder: Decoder = "pixel",
    decoder_steps: DecoderSteps = None,
    device: Device = None,
    dtype: Dtype = "auto",
    scale: Scale = 1,
):
    """Draw a video frame by frame."""
    with errors_in_one_line():
        from .video_processing_nextflow import check_video_path, write_frames

        check_video_path(output)
        check_distinct_paths([("--output", output)], ("--first-frame", first_frame))
        _check_files([first_frame] if first_frame else [])
        pipeline = _load_pipeline(model, device, dtype, decoder)
        _check_enlarged(pipeline, scale, output, decoder, height, width)
        start = time.perf_counter()
        result = pipeline.video(
            texts[0] if len(texts) == 1 else [texts],
            image=str(first_frame) if first_frame else None,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            **_decoding(decoder, decoder_steps),
            generator=_generators(pipeline, seed, 1),
        )
        seconds = time.perf_counter() - start
        write_frames([_enlarge(frame, scale) for frame in result.frames[0]], output, frames_per_second)
    for number, text in enumerate(result.transitions[0], start=2):
        typer.echo(f"Frame {number}: {text}")
    _print_paths(seconds, [output])


@app.command()
def describe(
    images: Annotated[list[Path], typer.Argument(help="Image files, or videos (.gif, .mp4), in order.")],
    model: Model,
    question: Annotated[str | None, typer.Option(help="The question; default: a description.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The largest length of the answer.")] = 128,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Describe images or videos, or answer a question about them."""
    with errors_in_one_line():
        _check_files(images)
        pipeline = _load_pipeline(model, device, dtype)
        pipeline._check_reads("describe")
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
    """Print how well images fit a prompt according to the model: log-likelihoods in nats."""
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
    suite: Annotated[str, typer.Option(help=f"The suite of scores: {', '.join(SUITES)}.")] = "shapes",
    limit: Annotated[int | None, typer.Option(min=1, help="The largest number of cases of each kind.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the scores.")] = None,
    sheets: Annotated[Path | None, typer.Option(help="Folder for contact sheets.")] = None,
    device: Device = None,
):
    """Score a checkpoint; prints suite, category and score."""
    with errors_in_one_line():
        check_distinct_paths([("--json", json_file)], ("--sheets", sheets))
        if json_file is not None:
            check_output_file(json_file)
        if sheets is not None:
            check_output_folder(sheets)
        scores = SUITES[suite](checkpoint, limit=limit, seeds=seeds, sheets=sheets, device=device)
        if json_file is not None:
            from .evaluation.results import write_result

            write_result(json_file, scores)
    typer.echo(json.dumps(scores, indent=2))


for command in (inspect, validate_data, extract_codes, check_codes, init, train, evaluate_run, recipes, serve, demo):
    app.command()(command)


def main():
    """Entry point of the console script."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # of libraries to one another: no command can heed them
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {' '.join(str(message).split())}\n"
    end_on_termination()
    app(prog_name="transformers-nextflow")


def _load_pipeline(model: str, device: str | None, dtype: str, decoder: str = "pixel") -> NextFlowPipeline:
    from .serving.loading import load_pipeline

    pipeline = load_pipeline(model, device, dtype, None if decoder in ("pixel", "diffusion") else decoder)
    pipeline.adds_provenance = ADDS_PROVENANCE.get()
    return pipeline


def _decoding(decoder: str, steps: int | None) -> dict[str, Any]:
    """A call's arguments for the options `Decoder` and `DecoderSteps`."""
    return {"decoder": "pixel" if decoder == "pixel" else "diffusion", "decoder_steps": steps}


def _generators(pipeline: NextFlowPipeline, seed: int, count: int) -> list[torch.Generator]:
    import torch

    pipeline.check_batch_size(count)  # before `count` generators are made
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def _check_files(paths: list[Path]):
    for path in paths:
        regular_file(path, "video" if path.suffix.lower() in VIDEO_EXTENSIONS else "image")


def _print_paths(seconds: float, paths: list[Path]):
    typer.echo(f"Drawn in {seconds:.2f} s:")
    typer.echo("\n".join(map(str, paths)))


def _check_image_path(output: Path, count: int, *others: tuple[str, Path | None]):
    """Check before drawing that images can be written and do not replace the `others`, so no drawing is lost."""
    check_distinct_paths([("--output", path) for path in _numbered(output, min(count, MAX_CHECKED))], *others)
    check_image_format(output)
    for path in _numbered(output, min(count, MAX_CHECKED)):
        check_output_file(path)


def _numbered(path: Path, count: int) -> list[Path]:
    """The path of a single image, or the paths of several, with their numbers before the extension."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]


def _preview(folder: Path, output: Path, number: int) -> Path:
    return folder / f"{output.stem}-scale-{number}{output.suffix}"


def _save(images: Sequence[Image.Image], output: Path, scale: int) -> list[Path]:
    """Save every image that can be saved. Raises an `OSError` that says where the others were saved."""
    paths, written, refused = _numbered(output, len(images)), [], []
    with note_on_interrupt(lambda: f"Images written: {', '.join(map(str, written)) or 'none'}."):
        for image, path in zip(images, paths):
            try:
                write_with_fallback(path, _enlarge(image, scale).save)
                written.append(path)
            except (OSError, ValueError) as error:
                refused.append(str(error))
    if refused:
        raise OSError(" ".join(refused))
    return paths


def _check_enlarged(
    pipeline: NextFlowPipeline,
    scale: int,
    output: Path,
    decoder: str,
    height: int | None = None,
    width: int | None = None,
):
    """Raises `ValueError` for enlarged images that take too much memory, or have more pixels than the format of
    `output` can hold.
    """
    if scale == 1:
        return
    side = max(pipeline.processor.image_processor.scale_schedules.resolutions)
    by_diffusion = decoder != "pixel" and pipeline.diffusion_decoder is not None
    factor = pipeline.diffusion_decoder.config.upsampling if by_diffusion else 1
    height, width = factor * (height or side), factor * (width or side)
    pixels = height * width
    if pixels * scale**2 > MAX_PIXELS:
        most = max(1, int((MAX_PIXELS / pixels) ** 0.5))
        raise ValueError(
            f"--scale {scale} makes images of more than {MAX_PIXELS} pixels, a quarter of a gigabyte each; "
            f"use {most} at most."
        )
    if image_format := Image.registered_extensions().get(output.suffix.lower()):
        size = (width * scale, height * scale)
        try:
            Image.new("RGB", size).save(io.BytesIO(), image_format)
        except Exception as error:
            raise ValueError(
                f"--scale {scale} makes images of {size[0]}x{size[1]} pixels, which {output.suffix} does not hold "
                f"({error}); use less, or .png."
            ) from error


def _enlarge(image: Image.Image, scale: int) -> Image.Image:
    # Repeats pixels, without interpolation.
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
