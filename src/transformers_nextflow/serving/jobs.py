"""Requests inside of a replica: their arguments, and the queue through which their answers return."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image


@dataclass(frozen=True)
class Partial:
    """A preview of an image after some of its scales.

    Args:
        index: how many of the request's partial images came before it.
        number: number of the image in the request, from 0.
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


@dataclass(frozen=True)
class Ended:
    """The end of a chat's answer, and why it ended: "stop", or "length" at the largest number of tokens."""

    finish_reason: str


END = object()


@dataclass(eq=False)
class Job:
    """The base of all requests. It is made in the event loop of the server; the model's thread puts answers into it.

    Args:
        options: arguments of the pipeline's call by name; requests with the same arguments may share a batch.
        partial_images: the requested number of previews of each image.
    """

    options: dict[str, Any] = field(default_factory=dict)
    partial_images: int = 0
    # Whether no client waits for the answer any more.
    abandoned: bool = field(default=False, init=False)
    answers: asyncio.Queue = field(default_factory=asyncio.Queue, init=False)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop, init=False)

    kind: ClassVar[str] = ""

    @property
    def num_images(self) -> int:
        """How many rows of a batch the request takes."""
        return 1

    @property
    def batch_key(self) -> Hashable:
        """The key of requests that share one call of the pipeline."""
        # Previews decode all images of a batch at each scale, so they are batched separately.
        return (self.kind, self.partial_images > 0, tuple(sorted((k, repr(v)) for k, v in self.options.items())))

    def put(self, answer: object):
        """Pass an answer, an exception, or `END` to the waiting client; callable from any thread."""
        if not self.abandoned and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.answers.put_nowait, answer)


@dataclass(eq=False)
class ImageJob(Job):
    """Images of a prompt, drawn or edited.

    Args:
        prompt, negative_prompt: texts.
        images: the images that the prompt refers to.
        mask: light where the image is drawn anew.
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
        messages: messages as arguments of `NextFlowPipeline.chat`.
        seed: seed of text and images.
        is_streamed: whether text is streamed; such a request is answered in a batch of its own.
    """

    messages: list[dict] = field(default_factory=list)
    seed: int = 0
    is_streamed: bool = False

    kind = "chat"

    @property
    def batch_key(self) -> Hashable:
        return (*super().batch_key, id(self) if self.is_streamed else None)
