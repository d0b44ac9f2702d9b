"""Rollouts of RL: drawn images with all that is needed to compute their likelihoods again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import nn

from ...generation.cached_sequences import Prompts
from ...generation.sampling import Generators, ImageSampling
from ...generation.scale_loop import ImageCodes
from ...generation.sequence_writer import SequenceWriter
from ...pipelines.requests import requested_schedule
from ...processing_nextflow import NextFlowProcessor, check_prompts
from ...scale_schedule import Grid, ScaleSchedule
from ...sequence.padding import pad_codes, padded_rows
from ...utils.evaluation_mode import in_evaluation_mode


@dataclass(frozen=True)
class Rollout:
    """One drawn image.

    Args:
        contexts: token ids of the prompt, then of its negative prompts, as in [`SequenceWriter`].
        input_tokens, input_grids: codes (N,) and final grids of the images in the prompt.
        schedule: schedule of the drawn image.
        image_tokens: its codes (N,), or those of the scales drawn so far.
    """

    contexts: tuple[list[int], ...]
    input_tokens: tuple[torch.Tensor, ...]
    input_grids: tuple[Grid, ...]
    schedule: ScaleSchedule
    image_tokens: torch.Tensor


def images_of(row: dict) -> list[Image.Image]:
    """The images that a row's prompt refers to: its `images`, or its `image`."""
    if row.get("images") is not None:
        return list(row["images"])
    return [row["image"]] if row.get("image") is not None else []


@torch.no_grad()
def generate_rollouts(
    model: nn.Module,
    processor: NextFlowProcessor,
    rows: Sequence[dict],
    sampling: ImageSampling,
    max_prompt_length: int | None = None,
    generator: Generators = None,
) -> tuple[list[Rollout], list[Image.Image]]:
    """Draw one image for each row.

    Args:
        rows: rows with `prompt`, a text; optionally `images` or `image`, to which it refers; optionally `height` and
            `width`, by default the size of the last of these images, or the model's largest square.
        max_prompt_length: in tokens, the slots of images included.

    Raises:
        ValueError: for a prompt that is no text, empty or too long, and for a size without a schedule.
    """
    prompts = check_prompts([row["prompt"] for row in rows])
    images = [processor.image_processor.to_rgb(found) if (found := images_of(row)) else [] for row in rows]
    schedules = [
        requested_schedule(processor, (row.get("height"), row.get("width")), found[-1] if found else None)
        for row, found in zip(rows, images)
    ]
    names, empty = sampling.contexts([schedule.num_scales for schedule in schedules]), [""] * len(prompts)
    asked = [(prompts, images), *((empty, images if name == "negative" else None) for name in names)]
    encoded = [processor.apply_image_prompt(texts, shown, allow_empty=True) for texts, shown in asked]
    contexts = list(zip(*(Prompts(e["input_ids"], e["attention_mask"]).rows() for e in encoded)))
    check_lengths(prompts, [row[0] for row in contexts], max_prompt_length)

    grids = encoded[0].get("image_grids")
    codes = iter(() if grids is None else model.get_image_tokens(encoded[0]["pixel_values"].to(model.device), grids))
    grids = iter(() if grids is None else grids.tolist())
    nothing = torch.zeros(0, dtype=torch.long, device=model.device)
    begun = [
        Rollout(own, tuple(next(codes) for _ in found), tuple(tuple(next(grids)) for _ in found), schedule, nothing)
        for own, found, schedule in zip(contexts, images, schedules)
    ]
    return continue_rollouts(model, processor, begun, sampling, generator)


@in_evaluation_mode
@torch.no_grad()
def continue_rollouts(
    model: nn.Module,
    processor: NextFlowProcessor,
    begun: Sequence[Rollout],
    sampling: ImageSampling,
    generator: Generators = None,
) -> tuple[list[Rollout], list[Image.Image]]:
    """Draw the missing scales of images whose `image_tokens` hold the first scales, or none."""
    schedules = [rollout.schedule for rollout in begun]
    given = pad_codes([rollout.image_tokens for rollout in begun])
    drawing = ImageCodes(model, schedules, sampling, generator, given)
    writer = SequenceWriter(model, *_prompts_and_contexts(begun, processor, model.device))
    writer.draw(drawing, range(len(begun)), continues=False)
    grids = torch.tensor([schedule.final_grid for schedule in schedules])
    images = processor.post_process_images(model.decode_image_tokens(drawing.image_tokens, grids))
    rollouts = [
        replace(rollout, image_tokens=codes[: rollout.schedule.num_tokens])
        for rollout, codes in zip(begun, drawing.image_tokens)
    ]
    return rollouts, images


def check_lengths(prompts: Sequence[str], rows: Sequence[list[int]], limit: int | None):
    """Raises `ValueError` for a prompt whose row of token ids is longer than `limit`."""
    for prompt, row in zip(prompts, rows):
        if limit is not None and len(row) > limit:
            raise ValueError(
                f"The prompt {prompt[:80]!r} takes {len(row)} tokens with its images, and max_prompt_length is "
                f"{limit}; shorten it, leave it out of the dataset, or raise the limit."
            )


def likelihood_inputs(
    rollouts: Sequence[Rollout], model: nn.Module, processor: NextFlowProcessor, sampling: ImageSampling
) -> tuple[Prompts, list[Prompts], ImageCodes]:
    """Prompts, contexts and images of finished rollouts, as arguments of `prefix_log_probabilities`."""
    prompts, contexts = _prompts_and_contexts(rollouts, processor, model.device)
    drawing = ImageCodes(model, [rollout.schedule for rollout in rollouts], sampling)
    codes = pad_codes([rollout.image_tokens for rollout in rollouts])
    drawing.image_tokens = codes.to(model.device)
    return prompts, contexts, drawing


def _prompts_and_contexts(
    rollouts: Sequence[Rollout], processor: NextFlowProcessor, device: torch.device
) -> tuple[Prompts, list[Prompts]]:
    prompts, *contexts = (
        _padded(rollouts, list(rows), processor, device) for rows in zip(*(r.contexts for r in rollouts))
    )
    return prompts, contexts


def _padded(
    rollouts: Sequence[Rollout], rows: list[list[int]], processor: NextFlowProcessor, device: torch.device
) -> Prompts:
    """Rows of token ids as a batch, with the images in them."""
    holding = [rollout for rollout, row in zip(rollouts, rows) if processor.eoi_token_id in row]
    codes = [codes.to(device) for rollout in holding for codes in rollout.input_tokens]
    grids = [grid for rollout in holding for grid in rollout.input_grids]
    max_new_positions = [rollout.schedule.num_positions(processor.read_last_scale) - 1 for rollout in rollouts]
    return Prompts(
        *padded_rows(rows, processor.tokenizer.pad_token_id, device),
        image_tokens=pad_codes(codes),
        image_grids=torch.tensor(grids, device=device) if grids else None,
        max_new_positions=torch.tensor(max_new_positions, device=device),
    )
