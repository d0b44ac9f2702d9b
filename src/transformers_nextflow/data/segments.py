"""Encodes conversations to tokens, and finds those that are trained on."""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import accumulate

from ..processing_nextflow import NextFlowProcessor
from ..sequence.chat_encoding import CLOSE, OPEN, EncodedChat, encode_chats
from .rows import is_trained


def encode_messages(processor: NextFlowProcessor, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """Token ids of a [`Sample`]'s messages, one placeholder for each image, and whether each is trained on.

    The turns of the assistant are trained on, their end token included; "train" of a message changes that for the whole
    message, and "train" of a part for the part.

    Raises:
        ValueError: for text that holds the two noncharacters that mark parts here.
    """
    (encoded,) = encode_chats(
        processor.tokenizer, [messages], processor.chat_template, with_answers=True, image_token=processor.image_token
    )
    if not any("train" in segment for message in messages for segment in (message, *message["content"])):
        return encoded.ids, encoded.is_answer
    return encoded.ids, _with_flags(processor, messages, encoded)


def _with_flags(processor: NextFlowProcessor, messages: list[dict], encoded: EncodedChat) -> list[bool]:
    trained, spans = list(encoded.is_answer), _spans_of_parts(processor, messages)
    # What the assistant writes beside the parts of a message, such as its end, belongs to the message that began last.
    begins = [spans[index][0] for index in accumulate([0, *(len(message["content"]) for message in messages[:-1])])]
    for token, start in enumerate(encoded.starts):
        if trained[token]:
            trained[token] = messages[max(0, bisect_right(begins, start) - 1)].get("train", True)
    flags = [is_trained(message, part) for message in messages for part in message["content"]]
    for (first, last), flag in zip(spans, flags):
        for token, start in enumerate(encoded.starts):
            if first <= start < last:
                trained[token] = flag
    return trained


def _spans_of_parts(processor: NextFlowProcessor, messages: list[dict]) -> list[tuple[int, int]]:
    """Where each part begins and ends, in characters of the rendered conversation.

    Raises:
        ValueError: if the marks around the parts change what the template writes, as where it trims texts.
    """
    marked = []
    for message in messages:
        parts = []
        for part in message["content"]:
            parts += [{"type": "text", "text": OPEN}, part, {"type": "text", "text": CLOSE}]
        marked.append(message | {"content": parts})
    spans, place, pieces = [], 0, re.split(f"([{OPEN}{CLOSE}])", _render(processor, marked))
    if "".join(pieces[::2]) != _render(processor, messages):
        raise ValueError(
            'The chat template trims texts or treats empty ones apart, so "train" cannot say which of its tokens are '
            "meant; leave empty texts and white space around texts out, or the flags."
        )
    for piece in pieces:
        if piece == OPEN:
            spans.append((place, place))
        elif piece == CLOSE:
            spans[-1] = (spans[-1][0], place)
        else:
            place += len(piece)
    return spans


def _render(processor: NextFlowProcessor, messages: list[dict]) -> str:
    return processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)
