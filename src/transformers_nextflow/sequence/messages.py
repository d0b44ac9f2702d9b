"""Messages of conversations, in rows and in chats: their schema, in which they are read and checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..utils.field_errors import FieldError, abbreviate
from ..utils.plain_values import as_list
from .chat_encoding import text_fault


ROLES = ("system", "user", "assistant")
# Names under which a part of a chat may give its image; those after the first are transformers' own.
IMAGE_NAMES = ("image", "url", "path", "base64")


def check_conversation(messages: Any, place: str = "messages"):
    """Raises `FieldError` naming what is wrong in the messages of a chat, in which each part has its own image."""
    given = as_list(messages)
    if not given:
        raise FieldError(
            place, f"must be a list of at least one message with role and content, got {abbreviate(messages)}"
        )
    for number, message in enumerate(given):
        parts = read_message(message, f"{place}[{number}]", IMAGE_NAMES)["content"]
        for index, part in enumerate(parts):
            if part["type"] != "text" and len(part.keys() - {"train"}) < 2:
                raise FieldError(f"{place}[{number}].content[{index}].{part['type']}", "is missing")


def read_message(message: Any, place: str, image_names: tuple[str, ...] = ("image",)) -> dict:
    """A message whose content is a list of parts.

    Args:
        place: the place of the message, for errors.
        image_names: names under which a part of type "image" may give its image.

    Raises:
        FieldError: for invalid messages or parts, and for entries that a training or a model would ignore.
    """
    if not isinstance(message, dict):
        raise FieldError(place, f"must be an object with role and content, got {abbreviate(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise FieldError(f"{place}.role", f"must be one of {ROLES}, got {abbreviate(role)}")
    _check_names(message, ("role", "content"), place, "message")
    if isinstance(content, str):
        parts = [{"type": "text", "text": _text(content, f"{place}.content")}]
    elif not (given := as_list(content)):
        raise FieldError(f"{place}.content", f"must be a text or a list of parts, got {abbreviate(content)}")
    else:
        parts = [_read_part(part, f"{place}.content[{number}]", image_names) for number, part in enumerate(given)]
    return {"role": role, "content": parts} | _train_flag(message, place)


def _read_part(part: Any, place: str, image_names: tuple[str, ...]) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in ("text", "image", "video"):
        raise FieldError(f"{place}.type", f"must be text, image or video, got {abbreviate(part)}")
    names = image_names if kind == "image" else (kind,)
    _check_names(part, ("type", *names), place, f"part of type {kind}")
    if kind == "text":
        return {"type": kind, kind: _text(part.get(kind), f"{place}.text")} | _train_flag(part, place)
    given = {name: part[name] for name in names if part.get(name) is not None}
    return {"type": kind} | given | _train_flag(part, place)


def _check_names(holder: dict, names: tuple[str, ...], place: str, kind: str):
    """Raises `FieldError` for entries that training would ignore: a misspelt flag, a second image, a thought beside the
    content.

    Empty values are allowed, since Arrow and TRL write them for missing ones.
    """
    for name, value in holder.items():
        if name not in (*names, "train") and value is not None and not (isinstance(value, str | list) and not value):
            allowed = ", ".join((*names, "train"))
            raise FieldError(f"{place}.{name}", f"a {kind} holds {allowed} and nothing else, got {abbreviate(value)}")


def _text(text: Any, place: str) -> str:
    if not isinstance(text, str):
        raise FieldError(place, f"must be a string, got {abbreviate(text)}")
    if fault := text_fault(text):
        raise FieldError(place, fault)
    return text


def _train_flag(holder: dict, place: str) -> dict:
    flag = holder.get("train")
    if flag is not None and not isinstance(flag, bool | np.bool_):
        raise FieldError(f"{place}.train", f"must be true or false, got {abbreviate(flag)}")
    return {} if flag is None else {"train": bool(flag)}
