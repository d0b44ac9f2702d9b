"""Rows of prompts for RL, checked before images are drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from inspect import signature
from itertools import islice
from pathlib import Path

from datasets import Dataset, Image, IterableDataset, List

from ...data.columns import Columns
from ...data.row_codes import TOKENS
from ...data.row_errors import BadRowError
from ...data.rows import ROW_NUMBER, NumberedRows, Sample, is_trained, read_row
from ...data.sources import JsonLines, open_rows
from ...processing_nextflow import check_prompts
from ...utils.short_repr import short_repr


# Columns of the images to which prompts refer.
IMAGE_COLUMNS = ("image", "images")


def read_prompts(source: str | os.PathLike, columns: Columns | None = None) -> Dataset:
    """Prompts for RL: the rows with `prompt` of a `.jsonl` file, with all their fields, which are passed to rewards,
    and with paths of their images relative to the file; from other sources (`open_rows`) the texts and input images of
    each row's first turn, if the user's turn is answered with an image. Later turns do not count, and rows that begin
    otherwise are left out.

    Raises:
        ValueError: for an invalid source, rows none of which begins so, or images of a prompt that are given only as
            codes.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        lines = JsonLines(path)
        if len(lines) and isinstance(lines[0], dict) and "prompt" in lines[0] and "messages" not in lines[0]:
            return _table_of([_with_located_images(row, path.parent) for row in _checked_lines(lines)], source)
    rows, root = open_rows(source, columns)
    found = []
    for number, row in enumerate(rows):
        try:
            turn = _first_turn(read_row(row, root))
        except BadRowError as error:
            raise error.of_row(number) from error
        if turn is not None:
            found.append(turn)
    if not found:
        raise ValueError(
            f"No row of {source} begins with a text of the user that an image answers; RL needs prompts to draw from."
        )
    prompts = Dataset.from_dict({"prompt": [prompt for prompt, _ in found]})
    if not any(images for _, images in found):
        return prompts.select(
            sorted({prompt: number for number, (prompt, _) in reversed([*enumerate(found)])}.values())
        )
    images = [
        [{"bytes": i, "path": None} if isinstance(i, bytes) else {"bytes": None, "path": i} for i in own]
        for _, own in found
    ]
    return prompts.add_column("images", images).cast_column("images", List(Image()))


def _first_turn(sample: Sample) -> tuple[str, list[str | bytes]] | None:
    """The text and the images of the user's turn with which a row begins, if it is answered with an image; else `None`.

    Raises:
        BadRowError: if these images are given only as codes, since RL reads images.
    """
    messages = sample.messages[:2]
    if [message["role"] for message in messages] != ["user", "assistant"]:
        return None
    asked, answered = (message["content"] for message in messages)
    prompt = " ".join(part["text"] for part in asked if part["type"] == "text").strip()
    if not prompt or not any(part["type"] == "image" and is_trained(messages[1], part) for part in answered):
        return None
    count = sum(part["type"] == "image" for part in asked)
    if len(shown := sample.images[:count]) < count:
        problem = f"holds the codes of the prompt's {count} images, and RL reads images; give the rows that have them"
        raise BadRowError(TOKENS, problem)
    return prompt, [image if isinstance(image, bytes) else str(image) for image in shown]


def _checked_lines(lines: JsonLines) -> list[dict]:
    """The rows of a file. Raises `ValueError` naming one that is no object, or whose prompt cannot be used."""
    rows = []
    for number, row in enumerate(NumberedRows(lines)):
        prompt = row.get("prompt")
        try:
            check_prompts([text_of_prompt(prompt) if isinstance(prompt, list) else prompt])
        except ValueError as error:
            raise BadRowError("prompt", str(error).removeprefix("Prompt 0 ")).of_row(number) from error
        rows.append({name: value for name, value in row.items() if name != ROW_NUMBER})
    return rows


def _with_located_images(row: dict, folder: Path) -> dict:
    """The row with images that are files in the folder by their paths; URLs and base64 stay."""

    def located(image):
        is_file = isinstance(image, str) and os.path.isfile(folder / image)
        return str(folder / image) if is_file else image

    given = {name: row[name] for name in IMAGE_COLUMNS if row.get(name) is not None}
    return row | {name: [*map(located, i)] if isinstance(i, list) else located(i) for name, i in given.items()}


def _table_of(rows: list[dict], source: str | os.PathLike) -> Dataset:
    """The rows with the fields of all of them; those that a row lacks are `None`. Raises `ValueError` naming a field
    that no table holds.
    """
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    # Values of different kinds, as the positions of GenEval's prompts are: ["left of", 0].
    takes_mixed = "on_mixed_types" in signature(Dataset.from_dict).parameters
    kinds = {"on_mixed_types": "use_json"} if takes_mixed else {}
    for name, values in columns.items():
        try:
            Dataset.from_dict({name: values}, **kinds)
        except (OverflowError, TypeError, ValueError) as error:
            remedy = "" if takes_mixed else ", or install a newer datasets"
            raise ValueError(
                f"The field {name!r} of {source} holds values of different kinds: {error}; give it one kind{remedy}."
            ) from error
    return Dataset.from_dict(columns, **kinds)


def check_dataset(name: str, rows: Dataset | IterableDataset, needed: int):
    """Check the prompts of a dataset; of a stream, and of rows that are made on access, only those of the first batch.

    Args:
        name: name of the dataset in errors.
        needed: number of prompts of a batch; with fewer rows there would be no step.

    Raises:
        ValueError: for fewer rows, and for all that `check_rows` refuses.
    """
    is_table = isinstance(rows, Dataset) and rows.format["type"] != "custom"
    first = rows if is_table else list(islice(rows, needed))
    if len(first) < needed:
        raise ValueError(
            f"{name} has {len(first)} rows, but each batch takes {needed} prompts (generation_batch_size over "
            "num_generations); give more prompts, or make the batches smaller."
        )
    if is_table and "prompt" in rows.column_names:
        _check_texts(name, rows.with_format(None)["prompt"][:])  # all at once: row by row takes a minute for a million
    else:
        check_rows(name, first)


def check_rows(name: str, rows: Sequence[dict]):
    """Raises `ValueError` naming the first row without a `prompt`, or whose prompt is no text or empty."""
    for number, row in enumerate(rows):
        if "prompt" not in row:
            raise ValueError(f"Row {number} of {name} has no 'prompt', only {sorted(row)}; give every row one.")
    _check_texts(name, [row["prompt"] for row in rows])


def prompts_as_texts(rows):
    """A dataset, or a dict of them, in which prompts that are conversations of one user's turn become texts."""
    if isinstance(rows, dict):
        return {name: prompts_as_texts(part) for name, part in rows.items()}
    first = next(iter(rows), None)
    is_conversation = first is not None and isinstance(first.get("prompt"), list)
    return rows.map(lambda row: {"prompt": text_of_prompt(row["prompt"])}) if is_conversation else rows


def text_of_prompt(prompt) -> str:
    """The text of the user. Raises `ValueError` for anything but one turn of a user, with text."""
    turns = prompt if isinstance(prompt, list) else []
    if len(turns) != 1 or not isinstance(turns[0], dict) or turns[0].get("role") != "user":
        raise ValueError(f"A prompt is a text, or a conversation of one turn of a user, got {short_repr(prompt)}.")
    content = turns[0].get("content")
    parts = content if isinstance(content, list) and all(isinstance(part, dict) for part in content) else []
    texts = [content] if isinstance(content, str) else [part.get("text") for part in parts]
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
