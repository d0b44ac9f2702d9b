"""The layouts of conversations: what the user gives and what the model answers, in training and in use.

A turn is a tuple of parts in order: texts (`str`) and images. An image may be anything that is no text: a `Scene`, a
PIL image, an array.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..tokenization_nextflow import THINK_PREFIX


Part = Any


class Exchange(NamedTuple):
    """A turn of the user and the answer to it."""

    asked: tuple[Part, ...]
    answer: tuple[Part, ...]


def drawing(prompt: str, image: Part, images: Sequence[Part] = ()) -> Exchange:
    """Drawing from a text, and with `images` before it: editing, subject-driven and in-context generation."""
    return Exchange((*images, prompt), (image,))


def thinking(prompt: str, thought: str, image: Part) -> Exchange:
    """Drawing after a thought in words."""
    return Exchange((prompt,), (f"{THINK_PREFIX} {thought}", image))


def sequence(prompt: str, frames: Sequence[Part], texts: Sequence[str], first_given: bool = False) -> Exchange:
    """Stories and videos: frames with a text between each two; a given first frame is the user's.

    Raises ValueError unless there is one text fewer than frames.
    """
    if len(texts) != len(frames) - 1:
        raise ValueError(f"{len(frames)} frames take {len(frames) - 1} texts between them, got {len(texts)}.")
    rest = tuple(part for pair in zip(texts, frames[1:]) for part in pair)
    return Exchange((frames[0], prompt), rest) if first_given else Exchange((prompt,), (frames[0], *rest))


def answering(question: str, answer: str, images: Sequence[Part] = ()) -> Exchange:
    """Questions on images, videos (their frames) and plain texts, and captions."""
    return Exchange((*images, question), (answer,))


def message(role: str, parts: Iterable[Part]) -> dict:
    """A turn in the chat format; images are placeholders."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
    return {"role": role, "content": content}


def to_messages(exchanges: Iterable[Exchange]) -> list[dict]:
    """A conversation in the chat format."""
    return [
        message(role, parts)
        for exchange in exchanges
        for role, parts in (("user", exchange.asked), ("assistant", exchange.answer))
    ]


def images_of(parts: Iterable[Part]) -> list[Part]:
    """The parts that are images."""
    return [part for part in parts if not isinstance(part, str)]


def texts_of(parts: Iterable[Part]) -> list[str]:
    """The parts that are texts."""
    return [part for part in parts if isinstance(part, str)]
