"""Rows of prompts for RL, looked at before anything is drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from datasets import Dataset, IterableDataset

from ...processing_nextflow import check_prompts
from ...utils.short_repr import short_repr


def check_dataset(name: str, rows: Dataset | IterableDataset, needed: int):
    """Check the prompts of a dataset; of a stream, and of rows that are made when they are read, those of the first
    batch.

    Args:
        name: what errors call the dataset.
        needed: prompts of a batch; a dataset with fewer would be trained in no step.

    Raises:
        ValueError: for fewer rows, and what `check_rows` refuses.
    """
    is_table = isinstance(rows, Dataset) and rows.format["type"] != "custom"
    first = rows if is_table else list(islice(rows, needed))
    if len(first) < needed:
        raise ValueError(
            f"{name} has {len(first)} rows, but each batch takes {needed} prompts (generation_batch_size over "
            "num_generations); give more prompts, or make the batches smaller."
        )
    if is_table and "prompt" in rows.column_names:
        _check_texts(name, rows.with_format(None)["prompt"][:])  # at once: row by row takes a minute a million
    else:
        check_rows(name, first)


def check_rows(name: str, rows: Sequence[dict]):
    """Raises `ValueError` naming the first row without a `prompt`, or one whose prompt is no text or an empty one."""
    for number, row in enumerate(rows):
        if "prompt" not in row:
            raise ValueError(f"Row {number} of {name} has no 'prompt', only {sorted(row)}; give every row one.")
    _check_texts(name, [row["prompt"] for row in rows])


def with_texts(rows):
    """A dataset, or a dict of them, whose prompts are texts where they were conversations of one user's turn."""
    if isinstance(rows, dict):
        return {name: with_texts(part) for name, part in rows.items()}
    first = next(iter(rows), None)
    is_conversation = first is not None and isinstance(first.get("prompt"), list)
    return rows.map(lambda row: {"prompt": text_of_prompt(row["prompt"])}) if is_conversation else rows


def text_of_prompt(prompt) -> str:
    """What the user says. Raises `ValueError` for anything but one turn of a user, with text."""
    turns = prompt if isinstance(prompt, list) else []
    if len(turns) != 1 or turns[0].get("role") != "user":
        raise ValueError(f"A prompt is a text, or a conversation of one turn of a user, got {short_repr(prompt)}.")
    content = turns[0]["content"]
    texts = [content] if isinstance(content, str) else [part.get("text") for part in content]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"A conversation of a prompt holds text; its images are the row's image or images: {short_repr(prompt)}."
        )
    return "".join(texts)


def _check_texts(name: str, prompts: list):
    try:
        check_prompts(prompts)
    except ValueError as error:
        raise ValueError(f"In the rows of {name}: {error}") from error
