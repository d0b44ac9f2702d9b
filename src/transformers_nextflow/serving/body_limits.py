"""Limits on the length of request bodies and on the time until they arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


class RequestBodyError(Exception):
    """A body that is not read further; `status` is the status of the answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class BodyLimits:
    """ASGI middleware that limits the bytes and the time of request bodies while they are received.

    Args:
        app: the wrapped application, which turns [`RequestBodyError`] into an answer.
        max_bytes: the largest number of bytes of a body.
        seconds: the longest time from the request's head to the end of its body.
    """

    def __init__(self, app: Callable, max_bytes: int, seconds: float):
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: dict, receive: Callable[[], Awaitable[dict]], send: Callable):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        end, count, whole = time.monotonic() + self.seconds, 0, False
        announced = dict(scope.get("headers", ())).get(b"content-length", b"")
        is_too_long = announced.isdigit() and int(announced[:20]) > self.max_bytes

        async def limited() -> dict:
            nonlocal count, whole
            if is_too_long and not whole:  # the rest is not received
                raise RequestBodyError(413, f"The request has more than the {self.max_bytes} bytes that are read.")
            if whole:  # the next message says that the client has left; it has no time limit
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError as error:
                raise RequestBodyError(
                    408, f"The request's body did not arrive within {self.seconds:g} seconds."
                ) from error
            count += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if count > self.max_bytes:
                raise RequestBodyError(413, f"The request has more than the {self.max_bytes} bytes that are read.")
            return message

        await self.app(scope, limited, send)
