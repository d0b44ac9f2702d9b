"""A reward for images with text: whether an image shows the words that its prompt asks for."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn


QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


def edit_distance(one: str, other: str) -> int:
    """The number of letters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(other) + 1))
    for index, letter in enumerate(one, start=1):
        diagonal, row[0] = row[0], index
        for column, match in enumerate(other, start=1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (letter != match))
    return row[-1]


def quoted_text(prompt: str) -> str | None:
    """The texts in quotation marks in a prompt, joined by spaces; `None` if there are none."""
    found = [straight or curved for straight, curved in QUOTED.findall(prompt)]
    return " ".join(found) or None


def rendered_text_reward(model: nn.Module, processor, max_new_tokens: int = 32) -> Callable:
    """One minus the edit distance between the requested words and those that are read, divided by the longer one's
    length; upper and lower case count as equal.

    The requested words are the dataset's column `text`, or those in quotation marks in the prompt; an image without
    either is not scored.

    Args:
        model: an image-to-text model of transformers that reads a line of text, such as
            `VisionEncoderDecoderModel.from_pretrained("microsoft/trocr-base-printed")`.
        processor: the model's own.
    """
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def rendered_text(prompts, completions, text=None, **_) -> list[float | None]:
        wanted = list(map(quoted_text, prompts)) if text is None else text
        pixel_values = processor(images=list(completions), return_tensors="pt").pixel_values.to(model.device)
        output = model.generate(pixel_values, max_new_tokens=max_new_tokens, do_sample=False)
        read = processor.batch_decode(output, skip_special_tokens=True)
        return [None if want is None else _agreement(want, found) for want, found in zip(wanted, read)]

    return rendered_text


def _agreement(wanted: str, found: str) -> float:
    wanted, found = wanted.strip().lower(), found.strip().lower()
    return 1 - edit_distance(wanted, found) / max(len(wanted), len(found), 1)
