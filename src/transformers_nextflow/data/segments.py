"""Conversations to tokens, and which of them are trained on."""

from __future__ import annotations

import re

from ..processing_nextflow import NextFlowProcessor
from ..tokenization_nextflow import CLOSE, OPEN
from .rows import is_trained


def encode_messages(processor: NextFlowProcessor, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """Token ids of a [`Sample`]'s messages, one placeholder for each picture, and whether each is trained on.

    Trained on are the turns of the assistant, their end token included; "train" of a message decides otherwise for the
    whole message, and "train" of a part for the part.

    Raises:
        ValueError: for text that holds the two noncharacters that mark parts here.
    """
    encoded = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = encoded["input_ids"], [bool(answer) for answer in encoded["assistant_masks"]]
    if not any("train" in segment for message in messages for segment in (message, *message["content"])):
        return ids, trained
    return ids, _with_flags(processor, messages, trained)


def _with_flags(processor: NextFlowProcessor, messages: list[dict], trained: list[bool]) -> list[bool]:
    trained = list(trained)
    # Turns of the assistant do not touch, so the runs of trained tokens are these turns.
    turns = [(match.start(), match.end()) for match in re.finditer("1+", "".join("01"[answer] for answer in trained))]
    answers = [message for message in messages if message["role"] == "assistant"]
    for (start, stop), message in zip(turns, answers):
        trained[start:stop] = [message.get("train", True)] * (stop - start)
    flags = [is_trained(message, part) for message in messages for part in message["content"]]
    starts = _starts_of_tokens(processor, messages)
    for (first, last), flag in zip(_spans_of_parts(processor, messages), flags):
        for token, start in enumerate(starts):
            if first <= start < last:
                trained[token] = flag
    return trained


def _starts_of_tokens(processor: NextFlowProcessor, messages: list[dict]) -> list[int]:
    """The character of the rendered conversation at which each token starts."""
    text = _render(processor, messages)
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [start for start, _ in encoded["offset_mapping"]]


def _spans_of_parts(processor: NextFlowProcessor, messages: list[dict]) -> list[tuple[int, int]]:
    """Where each part begins and ends, in characters of the rendered conversation."""
    marked = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if OPEN in part.get("text", "") or CLOSE in part.get("text", ""):
                raise ValueError(f"The text holds U+FDD0 or U+FDD1, which are no characters: {part['text']!r}.")
            parts += [{"type": "text", "text": OPEN}, part, {"type": "text", "text": CLOSE}]
        marked.append(message | {"content": parts})
    spans, place = [], 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", _render(processor, marked)):
        if piece == OPEN:
            spans.append((place, place))
        elif piece == CLOSE:
            spans[-1] = (spans[-1][0], place)
        else:
            place += len(piece)
    return spans


def _render(processor: NextFlowProcessor, messages: list[dict]) -> str:
    return processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)
