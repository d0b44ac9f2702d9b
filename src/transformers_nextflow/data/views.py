"""The ways in which a stage takes a row: as it is, turned round into a caption, or with its prompt left empty."""

from __future__ import annotations

from ..processing_nextflow import NextFlowProcessor
from .row_codes import CLEAN_TOKENS, LABELS, TOKENS, read_codes
from .row_encoding import encode_sample
from .row_errors import BadRowError
from .rows import read_messages, read_row
from .stored_sizes import SIZES


UNCHANGED, AS_CAPTION, WITHOUT_PROMPT = VIEWS = range(3)


def apply_view(row: dict, view: int, caption_request: str) -> dict:
    """The row in one of `VIEWS`, with what is stored of its size in this one.

    Raises:
        BadRowError: for codes sampled for self-correction without the clean ones, and what is no row.
    """
    if view == AS_CAPTION:
        row = as_caption(row, caption_request)
    elif view == WITHOUT_PROMPT:
        row = without_prompt(row)
    return sizes_of_view(row, view)


def sizes_of_view(row: dict, view: int) -> dict:
    """The row with the stored sizes of one of `VIEWS` only. Rows without them are returned as they are."""
    if row.get(SIZES[0]) is None:
        return row
    return row | {name: row[name][view : view + 1] for name in SIZES}


def size_fields(row: dict, processor: NextFlowProcessor) -> dict[str, list[int | None]]:
    """What is to be stored of the sizes of a row that holds codes, see `stored_sizes.py`."""
    lengths, trained, known = [], [], {}
    for view in VIEWS:
        own = apply_view(row, view, processor.caption_request)
        if id(own) not in known:  # most rows have one view only
            known[id(own)] = own, _count_positions(own, processor)
        length, count = known[id(own)][1]
        lengths.append(length)
        trained.append(count)
    return dict(zip(SIZES, (lengths, trained)))


def _count_positions(row: dict, processor: NextFlowProcessor) -> tuple[int, int] | tuple[None, None]:
    try:
        encoded = encode_sample(read_row(row), processor)
    except BadRowError:  # the error follows where the row is trained on
        return None, None
    return len(encoded.ids), encoded.num_trained


def as_caption(row: dict, request: str) -> dict:
    """A drawing turned round: the image and `request`, answered by the prompt. Other rows are returned as they are.

    The image is read with its clean codes, since it is not trained on.

    Raises:
        BadRowError: for codes sampled for self-correction without the clean ones, and what is no row.
    """
    turns = prompt_and_image(row)
    if turns is None or [part["type"] for part in turns[0]] != ["text"] or not turns[0][0]["text"]:
        return row
    turned = _with_turns(row, [*turns[1], {"type": "text", "text": request}], turns[0])
    codes = read_codes(turned, trained=[False])
    if codes is None:
        return turned
    return turned | {TOKENS: [image.tolist() for image in codes.read], LABELS: None, CLEAN_TOKENS: None}


def without_prompt(row: dict) -> dict:
    """A row that is answered by only an image, with its texts left empty and its images kept; others are unchanged."""
    turns = prompt_and_image(row)
    if turns is None:
        return row
    emptied = [part | {"text": ""} if part["type"] == "text" else part for part in turns[0]]
    return _with_turns(row, emptied, turns[1])


def prompt_and_image(row: dict) -> tuple[list[dict], list[dict]] | None:
    """The user's parts, and the answer's, in a row of one turn each that is answered by one image; `None` for others.

    Rows that say what is trained on are not changed.
    """
    messages = read_messages(row)
    if [message["role"] for message in messages] != ["user", "assistant"]:
        return None
    asked, answered = (message["content"] for message in messages)
    flagged = any("train" in holder for holder in (*messages, *asked, *answered))
    return None if flagged or [part["type"] for part in answered] != ["image"] else (asked, answered)


def _with_turns(row: dict, question: list[dict], answer: list[dict]) -> dict:
    return row | {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
