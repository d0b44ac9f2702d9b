"""The endpoints of OpenAI's API for images and chats, answered by one worker."""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ..utils.unique_names import load_json
from .body_limits import BodyLimits, RequestBodyError
from .jobs import ChatJob, Ended, Finished, ImageJob, Job, Partial
from .schemas import MAX_IMAGES, Body, ChatBody, EditBody, ImageBody, UploadedImages, region_of
from .usage import chat_usage, image_usage
from .worker import TooManyRequests, Worker


Answer = Partial | Finished | Ended | str
# Called with the endpoint's path and the status of each answer.
OnAnswer = Callable[[str, int], None]
PATHS = ("/health", "/v1/models", "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions")
B = TypeVar("B", bound=Body)


def create_app(worker: Worker, on_answer: OnAnswer = lambda path, status: None) -> FastAPI:
    """The ASGI application of a replica.

    Args:
        worker: the worker that answers requests.
        on_answer: a function that is called with path and status of each request, for metrics.
    """
    settings = worker.settings
    app = FastAPI(title=settings.name, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimits, max_bytes=settings.max_upload, seconds=settings.timeout)
    app.add_middleware(_StatusReporter, on_answer=on_answer)
    _add_error_handlers(app)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "waiting": worker.waiting}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": settings.name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.post("/v1/images/generations")
    async def generate(request: Request) -> Response:
        body = _checked(ImageBody, await _json(request), settings.name)
        job = ImageJob(
            prompt=body.prompt, negative_prompt=body.negative_prompt, seeds=body.seeds, options=body.options,
            partial_images=body.partial_images,
        )  # fmt: skip
        return await _images(worker, job, body, "image_generation")

    @app.post("/v1/images/edits")
    async def edit(request: Request) -> Response:
        async with request.form(max_files=17, max_part_size=settings.max_upload) as form:
            given = [(name, value) for name, value in form.multi_items() if not isinstance(value, UploadFile)]
            files = [(name, await value.read()) for name, value in form.multi_items() if isinstance(value, UploadFile)]
        fields = dict(given)
        if len(fields) < len(given):
            raise ValueError(f"{_repeated([name for name, _ in given])} is given twice.")
        body = _checked(EditBody, fields, settings.name, is_json=False)
        images, mask = await run_in_threadpool(_uploads, files)
        job = ImageJob(
            prompt=body.prompt, negative_prompt=body.negative_prompt, seeds=body.seeds, options=body.options,
            partial_images=body.partial_images, images=images, mask=mask,
        )  # fmt: skip
        return await _images(worker, job, body, "image_edit")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = _checked(ChatBody, await _json(request), settings.name)
        messages = await run_in_threadpool(lambda: body.conversation)
        job = ChatJob(
            messages=messages, seed=body.seed, options=body.options, is_streamed=body.stream,
            partial_images=body.partial_images,
        )  # fmt: skip
        answers = await _start_answers(worker, job)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": settings.name}
        processor = worker.pipeline.processor
        if body.stream:
            usage = partial(chat_usage, processor, job) if body.includes_usage else None
            return _events(_chat_chunks(answers, head, usage))
        given = [answer async for answer in answers]
        text, finished = "".join(a for a in given if isinstance(a, str)), [a for a in given if isinstance(a, Finished)]
        images = {"images": [_image_part(answer) for answer in finished]} if finished else {}
        message = {"role": "assistant", "content": text} | images
        choice = {"index": 0, "message": message, "finish_reason": given[-1].finish_reason}
        usage = await run_in_threadpool(chat_usage, processor, job, text, finished)
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": usage})

    return app


class _StatusReporter:
    """ASGI middleware that reports the status of each answer."""

    def __init__(self, app: Callable, on_answer: OnAnswer):
        self.app, self.on_answer = app, on_answer

    async def __call__(self, scope: dict, receive: Callable, send: Callable):
        async def counted(message: dict):
            if message["type"] == "http.response.start":
                self.on_answer(scope["path"], message["status"])
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)


async def _start_answers(worker: Worker, job: Job) -> AsyncIterator[Answer]:
    """The answers of a job, after the first one has arrived, so that refusals come before a status is sent."""
    await run_in_threadpool(worker.check, job)
    answers = worker.answers(job)
    first = await anext(answers, None)

    async def all_of_them() -> AsyncIterator[Answer]:
        try:
            if first is not None:
                yield first
            async for answer in answers:
                yield answer
        finally:
            await answers.aclose()

    return all_of_them()


async def _images(worker: Worker, job: ImageJob, body: ImageBody, event: str) -> Response:
    answers = await _start_answers(worker, job)
    if body.stream:
        return _events(_image_events(answers, body, event, partial(image_usage, worker.pipeline.processor, job)))
    finished = [answer async for answer in answers]
    data = [{"b64_json": _encoded(answer.image, body), "seed": answer.seed} for answer in finished]
    shared = {
        "size": _size(finished[0].image),
        "output_format": body.output_format,
        "usage": image_usage(worker.pipeline.processor, job, finished),
    }
    return JSONResponse({"created": int(time.time()), "data": data} | shared)


async def _image_events(
    answers: AsyncIterator[Answer], body: ImageBody, event: str, usage: Callable[[list[Finished]], dict]
) -> AsyncIterator[str]:
    common = {"output_format": body.output_format, "quality": "auto", "background": "opaque"}
    async for answer in _errors_as_bodies(answers):
        if isinstance(answer, dict):
            yield _event(answer, "error")
            return
        common |= {
            "created_at": int(time.time()),
            "size": _size(answer.image),
            "b64_json": _encoded(answer.image, body),
        }
        if isinstance(answer, Partial):
            name, own = f"{event}.partial_image", {"partial_image_index": answer.index, "image_index": answer.number}
        else:
            name, own = f"{event}.completed", {"seed": answer.seed, "usage": usage([answer])}
        yield _event({"type": name} | common | own, name)


async def _chat_chunks(
    answers: AsyncIterator[Answer], head: dict, usage: Callable[[str, list[Finished]], dict] | None
) -> AsyncIterator[str]:
    """Events of a streamed chat; with `usage` a last chunk without choices tells it, and those before have none yet."""
    head = head | {"object": "chat.completion.chunk"} | ({} if usage is None else {"usage": None})
    text, finished = "", []

    def chunk(delta: dict, reason: str | None = None) -> str:
        return _event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    yield chunk({"role": "assistant", "content": ""})
    async for answer in _errors_as_bodies(answers):
        if isinstance(answer, dict):
            yield _event(answer)
            return
        if isinstance(answer, Ended):
            yield chunk({}, answer.finish_reason)
            continue
        text += answer if isinstance(answer, str) else ""
        finished += [answer] if isinstance(answer, Finished) else []
        yield chunk({"content": answer} if isinstance(answer, str) else {"images": [_image_part(answer)]})
    if usage is not None:
        yield _event(head | {"choices": [], "usage": await run_in_threadpool(usage, text, finished)})
    yield "data: [DONE]\n\n"


async def _errors_as_bodies(answers: AsyncIterator[Answer]) -> AsyncIterator[Answer | dict]:
    """The answers; errors after the status was sent become bodies of errors."""
    try:
        async for answer in answers:
            yield answer
    except Exception as error:
        yield _error_of(error)[1]


def _event(data: dict, name: str | None = None) -> str:
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


def _events(events: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _image_part(answer: Partial | Finished) -> dict:
    content = io.BytesIO()
    answer.image.save(content, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    return part | ({"partial_image_index": answer.index} if isinstance(answer, Partial) else {})


def _encoded(image: Image.Image, body: ImageBody) -> str:
    content = io.BytesIO()
    is_lossy = body.output_compression is not None and body.output_format != "png"
    image.save(content, body.output_format, **({"quality": body.output_compression} if is_lossy else {}))
    return base64.b64encode(content.getvalue()).decode()


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _repeated(names: list[str]) -> str:
    return repr(next(name for number, name in enumerate(names) if name in names[:number])[:40])


def _uploads(files: list[tuple[str, bytes]]) -> tuple[list[Image.Image], Image.Image | None]:
    """Images and mask of a form."""
    images, masks, uploads = [], [], UploadedImages(MAX_IMAGES + 1)  # one more for the mask
    for name, content in files:
        if name.removesuffix("[]") not in ("image", "mask"):
            raise ValueError(f"{name[:40]!r} is not known; the files of an edit are image and mask.")
        (masks if name == "mask" else images).append(uploads.read(content, name))
    if not images or len(masks) > 1:
        raise ValueError(f"An edit has at least one image and at most one mask, got {len(images)} and {len(masks)}.")
    if len(images) > (most := 1 if masks else MAX_IMAGES):
        raise ValueError(f"An edit has at most {most} images{' where it has a mask' * bool(masks)}, got {len(images)}.")
    return images, region_of(masks[0]) if masks else None


async def _json(request: Request) -> dict:
    try:
        body = load_json(await request.body())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The request's body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError("The request's body must be an object.")
    return body


def _checked(kind: type[B], fields: dict[str, Any], name: str, is_json: bool = True) -> B:
    # Of JSON, whose values have types; those of a form are texts.
    body = kind.model_validate(fields, strict=is_json)
    if body.model not in (None, name):
        raise HTTPException(404, f"There is no model {body.model[:100]!r} here; the one that is served is {name!r}.")
    return body


def _error_of(error: Exception) -> tuple[int, dict]:
    """Status and body of an error, as OpenAI's clients read them."""
    param = None
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")  # pydantic's, before our own words
        reason = "this field is not known" if first["type"] == "extra_forbidden" else reason
        status, message = 400, f"{param}: {reason}"
    elif isinstance(error, TooManyRequests):
        status, message = 429, str(error)
    elif isinstance(error, TimeoutError):
        status, message = 504, "The answer took longer than the server's time limit."
    elif isinstance(error, RequestBodyError):
        status, message = error.status, str(error)
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, ValueError):
        status, message = 400, str(error)
    else:
        status, message = 500, "The server failed at this request; its log says why."
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    # A client may send halves of surrogate pairs, which no answer can hold.
    message, param = (text and text.encode("utf-8", "backslashreplace").decode() for text in (message, param))
    return status, {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _add_error_handlers(app: FastAPI):
    async def answer(request: Request, error: Exception) -> JSONResponse:
        status, body = _error_of(error)
        headers = {"Retry-After": str(error.retry_after)} if isinstance(error, TooManyRequests) else None
        return JSONResponse(body, status, headers)

    for kind in (ValueError, HTTPException, TooManyRequests, TimeoutError, RequestBodyError, Exception):
        app.add_exception_handler(kind, answer)
