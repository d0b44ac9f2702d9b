"""The worker of a replica, which admits, batches and answers requests with one pipeline in one thread."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from PIL import Image
from transformers.utils import logging

from ..generation.interleaved import InterleavedStreamer
from ..generation.sampling import ImageSampling
from ..generation.scale_loop import ScaleState
from ..pipeline_nextflow import NextFlowPipeline
from ..pipelines.requests import ImageRequest
from ..scale_schedule import ScaleSchedule
from ..sequence.messages import check_conversation
from .jobs import END, ChatJob, Ended, Finished, ImageJob, Job, Partial
from .settings import ServingSettings


logger = logging.get_logger(__name__)


class TooManyRequests(Exception):
    """The replica already has as many requests as it admits; `retry_after` is a number of seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"Too many requests are waiting; try again in {retry_after} seconds.")
        self.retry_after = retry_after


class ClientDisconnected(Exception):
    """The client has disconnected."""


class Worker:
    """Answers requests. Images do not depend on others in their batch, since each has a generator of its own.

    Args:
        pipeline: the pipeline, on its device.
        settings: the settings with all limits.
        schedule: passes a job to `run`, in a batch with others; default: in a batch of its own.
    """

    def __init__(
        self,
        pipeline: NextFlowPipeline,
        settings: ServingSettings,
        schedule: Callable[[Job], Awaitable] | None = None,
    ):
        self.pipeline, self.settings = pipeline, settings
        self.pipeline.set_progress_bar_config(disable=True)
        self.schedule = schedule or (lambda job: self.run([job]))
        self.thread = ThreadPoolExecutor(1, "nextflow")
        self.waiting = 0
        # The seconds of the last batch, from which `retry_after` is computed.
        self.last_seconds = 1.0
        # A function that is called with the number of images and the seconds of each batch.
        self.after_batch: Callable[[int, float], None] = lambda images, seconds: None

    def check(self, job: Job):
        """Raises `ValueError` for inputs that the pipeline would refuse, before the job is in a batch with others."""
        if job.num_images > (most := self.settings.max_batch_size):
            raise ValueError(f"n must be at most {most}, the images of one batch, got {job.num_images}.")
        if isinstance(job, ChatJob):
            check_conversation(job.messages)
        if isinstance(job, ImageJob):
            options = dict(job.options)
            size, paste_back = (
                (options.pop("height", None), options.pop("width", None)),
                options.pop("paste_back", False),
            )
            images = job.images or None
            request = ImageRequest.build(
                self.pipeline.processor,
                job.prompt,
                job.negative_prompt,
                images,
                job.mask,
                size,
                None,
                False,
                paste_back,
            )
            sampling = self.pipeline._sampling(bool(job.images), **options)
            self.pipeline.check_inputs(request, sampling, 1, 1, None, "pil", ())

    async def answers(self, job: Job) -> AsyncIterator[Partial | Finished | Ended | str]:
        """The answers to a job, as they are made; closing the iterator abandons the job.

        Raises:
            TooManyRequests: if it is not admitted.
            TimeoutError: after `settings.timeout` seconds.
            ValueError: for inputs that the pipeline refuses.
        """
        if self.waiting >= self.settings.max_waiting:
            batches = self.waiting / self.settings.max_batch_size
            raise TooManyRequests(max(1, math.ceil(batches * self.last_seconds)))
        self.waiting += 1
        end = time.monotonic() + self.settings.timeout
        # Not cancelled when the client leaves: the batch belongs to other clients too, and checks `abandoned`.
        task = asyncio.ensure_future(self.schedule(job))
        task.add_done_callback(lambda task: _end_if_failed(task, job))
        try:
            while True:
                answer = await asyncio.wait_for(job.answers.get(), max(0.0, end - time.monotonic()))
                if answer is END:
                    return
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            job.abandoned = True
            self.waiting -= 1

    async def run(self, jobs: Sequence[Job]) -> list[None]:
        """Answer a batch: jobs with the same key in one call of the pipeline, one key after the other."""
        await asyncio.get_running_loop().run_in_executor(self.thread, self._run, jobs)
        return [None] * len(jobs)

    def _run(self, jobs: Sequence[Job]):
        groups: dict[object, list[Job]] = {}
        for job in jobs:
            groups.setdefault(self._batch_key(job), []).append(job)
        for group in groups.values():
            self._run_group(group)

    def _batch_key(self, job: Job) -> Hashable:
        # A model that only writes in chats takes no generators, so answers of one call would depend on each other.
        return job if isinstance(job, ChatJob) and not self.pipeline.interleaves else job.batch_key

    def _run_group(self, jobs: list[Job]):
        jobs = [job for job in jobs if not job.abandoned]
        if not jobs:
            return
        start = time.perf_counter()
        try:
            self._draw(jobs) if isinstance(jobs[0], ImageJob) else self._chat(jobs)
        except ClientDisconnected:
            return
        except Exception as error:
            if len(jobs) == 1:
                if not isinstance(error, ValueError):
                    logger.exception("A request failed.")
                jobs[0].put(error)
                return
        else:
            for job in jobs:
                job.put(END)
            self.last_seconds = time.perf_counter() - start
            self.after_batch(sum(job.num_images for job in jobs), self.last_seconds)
            return
        # Each job is tried in its own call, which shows which of them failed; after the block above, in which the error
        # still holds the memory of the whole batch.
        for job in jobs:
            self._run_group([job])

    def _draw(self, jobs: list[ImageJob]):
        owners = [(job, number) for job in jobs for number in range(job.num_images)]
        inputs = {
            "prompt": [job.prompt for job, _ in owners],
            "negative_prompt": [job.negative_prompt for job, _ in owners],
            "image": [job.images for job, _ in owners] if jobs[0].images else None,
            "mask_image": None if jobs[0].mask is None else [job.mask for job, _ in owners],
        }
        with_previews = jobs[0].partial_images > 0

        def after_scale(pipeline, step: int, scale: int, values: dict):
            if all(job.abandoned for job in jobs):
                pipeline._interrupt = True
            elif with_previews:
                for (job, number), image in zip(owners, values["preview"]):
                    shown = preview_scales(self._num_scales(image), job.partial_images)
                    if scale in shown:
                        job.put(Partial(image, shown.index(scale), number))

        output = self.pipeline(
            **inputs,
            **jobs[0].options,
            generator=[_generator(job.seeds[number]) for job, number in owners],
            callback_on_step_end=after_scale,
            callback_on_step_end_tensor_inputs=["preview"] if with_previews else [],
        )
        for (job, number), image, tokens in zip(owners, output.images, output.image_tokens):
            job.put(Finished(image, job.seeds[number], int((tokens >= 0).sum())))

    def _chat(self, jobs: list[ChatJob]):
        sampling = replace(self.pipeline.model.default_image_sampling, image_guidance_scale=1.0)
        streamer = _Streamer(self.pipeline, jobs[0], sampling) if jobs[0].is_streamed else None
        options, seeded = dict(jobs[0].options), nullcontext()
        if self.pipeline.interleaves:
            options |= {"generator": [_generator(job.seed) for job in jobs], "sampling": sampling}
            options["callback"] = lambda model, scale, state: not all(job.abandoned for job in jobs)
        else:
            options["max_images"], seeded = 0, _seeded(jobs[0].seed, self.pipeline.model.device)
        with seeded:
            messages, reasons = self.pipeline.chat(
                [job.messages for job in jobs], **options, streamer=streamer, return_finish_reasons=True
            )
        for job, message, reason in zip(jobs, messages, reasons):
            for part in message["content"] if streamer is None else ():
                if part["type"] == "image":
                    job.put(_finished(self.pipeline, part["image"], job))
                elif text := TextBeforeStop(job.options.get("stop_strings"))(part["text"], is_end=True):
                    job.put(text)
            job.put(Ended(reason))

    def _num_scales(self, image) -> int:
        return schedule_of(self.pipeline, image).num_scales


class TextBeforeStop:
    """Passes on a text that comes in pieces, up to a text at which it stops, as OpenAI's API does.

    Called with a piece, it gives what can be told by now not to belong to a stop. With `is_end` nothing follows.
    """

    def __init__(self, stops: str | Sequence[str] | None):
        self.stops = [stops] if isinstance(stops, str) else list(stops or ())
        self.held, self.is_over = "", False

    def __call__(self, piece: str, is_end: bool = False) -> str:
        if self.is_over:
            return ""
        text = self.held + piece
        if found := [text.index(stop) for stop in self.stops if stop in text]:
            self.is_over = True
            return text[: min(found)]
        starts = [stop[:length] for stop in self.stops for length in range(1, len(stop))]
        count = 0 if is_end else max((len(start) for start in starts if text.endswith(start)), default=0)
        self.held = text[len(text) - count :]
        return text[: len(text) - count]


class _Streamer(InterleavedStreamer):
    """Passes the answer to a conversation to its job, piece by piece."""

    def __init__(self, pipeline: NextFlowPipeline, job: ChatJob, sampling: ImageSampling):
        super().__init__(pipeline.processor.tokenizer, skip_special_tokens=True)
        self.pipeline, self.job, self.sampling = pipeline, job, sampling
        self.before_stop = TextBeforeStop(job.options.get("stop_strings"))

    def put(self, value):
        if self.job.abandoned:
            raise ClientDisconnected
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if text := self.before_stop(text, is_end=stream_end):
            self.job.put(text)

    def put_scale(self, state: ScaleState):
        self._flush()
        self.on_finalized_text("", stream_end=True)  # what is held back belongs before the image
        schedule = state.schedules[0]
        scale = next(k for k in range(schedule.num_scales) if schedule.offsets[k + 1] == len(state.image_tokens[0]))
        shown = preview_scales(schedule.num_scales, self.job.partial_images)
        if not (state.is_finished or scale in shown):
            return
        pixels, _ = self.pipeline._checked(state.preview())
        image = self.pipeline.processor.post_process_images(pixels)[0]
        if state.is_finished:
            drawn = (state.image_tokens, [schedule.final_grid])
            [image] = self.pipeline._with_provenance([image], [0], [self.job.seed], self.sampling, *drawn)
            self.job.put(_finished(self.pipeline, image, self.job))
        else:
            self.job.put(Partial(image, shown.index(scale)))


def schedule_of(pipeline: NextFlowPipeline, image: Image.Image) -> ScaleSchedule:
    """The scales that an image was drawn by."""
    return pipeline.processor.image_processor.scale_schedules.for_size(image.height, image.width)


def preview_scales(num_scales: int, count: int) -> list[int]:
    """The scales after which `count` previews are shown, evenly spaced; never the last, after which the image is
    done.
    """
    count = min(count, num_scales - 1)
    return [(index + 1) * num_scales // (count + 1) - 1 for index in range(count)]


def _finished(pipeline: NextFlowPipeline, image: Image.Image, job: ChatJob) -> Finished:
    return Finished(image, job.seed, schedule_of(pipeline, image).num_tokens)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The block takes torch's own random numbers from a seed; their state is restored afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _end_if_failed(task: asyncio.Future, job: Job):
    """Pass an error of the batching itself to the waiting client."""
    if not task.cancelled() and (error := task.exception()) is not None:
        job.put(error)
