"""Requests on their way through a replica: what is asked for, and the queue through which the answers go back."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image


@dataclass(frozen=True)
class Partial:
    """An image of which some scales are drawn.

    Args:
        index: how many of the request's partial images came before it.
        number: of the image in the request, from 0.
    """

    image: Image.Image
    index: int
    number: int = 0


@dataclass(frozen=True)
class Finished:
    """A finished image, its seed, and the number of its tokens."""

    image: Image.Image
    seed: int | None = None
    num_tokens: int = 0


END = object()


@dataclass(eq=False)
class Job:
    """What all requests have. Made in the event loop of the server; the model's thread puts the answers.

    Args:
        options: arguments of the pipeline's call by name; requests with the same ones may share a batch.
        partial_images: how many previews of each image are wanted.
    """

    options: dict[str, Any] = field(default_factory=dict)
    partial_images: int = 0
    # Nobody waits for the answer any more.
    abandoned: bool = field(default=False, init=False)
    answers: asyncio.Queue = field(default_factory=asyncio.Queue, init=False)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop, init=False)

    kind: ClassVar[str] = ""

    @property
    def num_images(self) -> int:
        """Rows that it takes of a batch."""
        return 1

    @property
    def batch_key(self) -> Hashable:
        """Requests with equal keys are one call of the pipeline."""
        # Previews cost all images of a batch a decoding at each scale.
        return (self.kind, self.partial_images > 0, tuple(sorted((k, repr(v)) for k, v in self.options.items())))

    def put(self, answer: object):
        """Hand an answer, an exception, or `END` to whoever waits; from any thread."""
        if not self.abandoned and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.answers.put_nowait, answer)


@dataclass(eq=False)
class ImageJob(Job):
    """Images of a prompt, drawn or edited.

    Args:
        prompt, negative_prompt: texts.
        images: that the prompt speaks of.
        mask: light where is to be drawn.
        seeds: one for each image.
    """

    prompt: str = ""
    negative_prompt: str = ""
    images: list[Image.Image] = field(default_factory=list)
    mask: Image.Image | None = None
    seeds: list[int] = field(default_factory=lambda: [0])

    kind = "image"

    @property
    def num_images(self) -> int:
        return len(self.seeds)

    @property
    def batch_key(self) -> Hashable:
        return (*super().batch_key, bool(self.images), self.mask is not None)


@dataclass(eq=False)
class ChatJob(Job):
    """The answer to a conversation.

    Args:
        messages: as `NextFlowPipeline.chat` takes them.
        seed: of text and images.
        is_streamed: whether text is wanted as it comes; such a request is answered in a batch of its own.
    """

    messages: list[dict] = field(default_factory=list)
    seed: int = 0
    is_streamed: bool = False

    kind = "chat"

    @property
    def batch_key(self) -> Hashable:
        return (*super().batch_key, id(self) if self.is_streamed else None)
