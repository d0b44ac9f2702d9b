"""Interleaved generation of text and images: which rows write or draw, when they end, and streaming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from queue import Queue

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StopStringCriteria, TextIteratorStreamer
from transformers.utils import ModelOutput

from ..scale_schedule import ScaleSchedule
from ..sequence.padding import padded_rows
from .sampling import Generators, ImageSampling, check_generators, sample_codes
from .scale_loop import ImageCodes, ScaleCallback, ScaleState
from .sequence_writer import SequenceWriter


@dataclass(frozen=True)
class Segment:
    """A generated piece of text or an image: columns `start` to `stop` of its row in
    `InterleavedGenerationOutput.input_ids`.

    `image` is the index in `image_tokens` of an image, whose piece is `<boi>` to `<eoi>`; it is `None` for text.
    """

    start: int
    stop: int
    image: int | None = None


@dataclass
class InterleavedGenerationOutput(ModelOutput):
    """Finished sequences, prompts included, in the form that `forward` takes.

    Args:
        input_ids, attention_mask: (B, L), padded on the left.
        image_tokens: (num_images, N) codes of all images, row by row, padded with -1; `None` without images.
        image_grids: (num_images, 2) final grids.
        segments: for each row the generated pieces, in order.
        finish_reasons: for each row why it ended: "stop" (its end of turn, or a stop string), "length"
            (`max_new_tokens`) or "interrupted" (by the callback).
    """

    input_ids: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    image_tokens: torch.LongTensor | None = None
    image_grids: torch.LongTensor | None = None
    segments: list[list[Segment]] | None = None
    finish_reasons: list[str] | None = None


class InterleavedStreamer(TextIteratorStreamer):
    """Gives what a row generates while it is generated: pieces of text (`str`), and after each scale a [`ScaleState`],
    whose `preview()` is the image so far.

    >>> streamer = InterleavedStreamer(processor.tokenizer)
    >>> Thread(target=model.generate_interleaved, kwargs={**inputs, "streamer": streamer}).start()
    >>> for piece in streamer: ...

    Args:
        tokenizer: turns tokens into text.
        timeout: seconds to wait for the next piece; `None` waits for ever.
        decode_kwargs: arguments of `tokenizer.decode`.
    """

    text_queue: Queue

    def __init__(self, tokenizer: PreTrainedTokenizerBase, timeout: float | None = None, **decode_kwargs):
        # The loop never passes the prompt to the streamer, so there is none to skip.
        super().__init__(tokenizer, skip_prompt=False, timeout=timeout, **decode_kwargs)

    def put_scale(self, state: ScaleState):
        """Called after each scale; text before it is given out first."""
        self._flush()
        self.text_queue.put(state, timeout=self.timeout)

    def _flush(self):
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :]
        self.token_cache, self.print_len = [], 0
        if text:
            self.on_finalized_text(text)


class InterleavedLoop:
    """Generates the rows (B) of a batch until all have ended.

    Args:
        writer: the writer, which has read the prompts.
        schedules: the schedule of the images of each row.
        text: settings of text. The other arguments are those of `generate_interleaved`.

    Raises:
        ValueError: for arguments that are out of range or do not match the rows.
    """

    def __init__(
        self,
        writer: SequenceWriter,
        *,
        max_new_tokens: int,
        min_images: int,
        max_images: int,
        schedules: Sequence[ScaleSchedule],
        sampling: ImageSampling,
        generator: Generators,
        text: GenerationConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        callback: ScaleCallback | None,
        streamer: InterleavedStreamer | None,
    ):
        self.writer, self.model, self.config = writer, writer.model, writer.config
        self.batch = len(writer.tokens)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}.")
        if not 0 <= min_images <= max_images:
            raise ValueError(f"0 <= min_images <= max_images must hold, got {min_images} and {max_images}.")
        check_generators(generator, self.batch)
        if text.temperature is not None and not 0 <= text.temperature < float("inf"):
            raise ValueError(f"temperature must be a number from 0, got {text.temperature}.")
        if text.stop_strings is not None and tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: pass tokenizer=processor.tokenizer.")
        if streamer is not None and self.batch > 1:
            raise ValueError(f"A streamer follows one row, got {self.batch}; stream one prompt at a time.")
        self.max_new_tokens, self.min_images, self.max_images = max_new_tokens, min_images, max_images
        self.schedules, self.sampling, self.generator = schedules, sampling, generator
        self.callback, self.streamer = callback, streamer
        self.temperature = (1.0 if text.temperature is None else text.temperature) if text.do_sample else 0
        # In a generation config 0 means no top-k.
        self.truncation = {"top_k": text.top_k or None, "top_p": 1.0 if text.top_p is None else text.top_p}
        ImageSampling(**self.truncation)  # raises for values out of range
        ends = text.eos_token_id if text.eos_token_id is not None else self.config.text_config.eos_token_id
        self.end_ids = list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]
        self.stop = StopStringCriteria(tokenizer, text.stop_strings) if text.stop_strings is not None else None

        self.written: list[list[int]] = [[] for _ in range(self.batch)]
        self.num_images = [0] * self.batch
        self.ended = [False] * self.batch
        # Of rows that may not write any more.
        self.finish_reasons: dict[int, str] = {}
        self.is_interrupted = False
        # Rows that may not write any more, but have images to draw before they end.
        self.must_draw = [False] * self.batch
        self.starts = [len(ids) for ids in self.writer.tokens]
        self.segments: list[list[Segment]] = [[] for _ in range(self.batch)]

    def run(self) -> InterleavedGenerationOutput:
        for row in self.writer.rows_at_boi():
            if self.num_images[row] >= self.max_images:
                raise ValueError(
                    f"Row {row} ends with <boi> and may draw {self.max_images} images; raise max_images, or end the "
                    "prompt before <boi>."
                )
            self.starts[row] -= 1
        for row in range(self.batch):
            self._end_if_at_limit(row)
        while not all(self.ended):
            at_boi = [row for row in self.writer.rows_at_boi() if not self.ended[row]]
            writing = [row for row in range(self.batch) if not self.ended[row] and row not in at_boi]
            if writing:
                self._write(writing)
            else:
                self._draw(at_boi)
        if self.streamer is not None:
            self.streamer.end()
        return self._output()

    def _end_if_at_limit(self, row: int, is_stopped: bool = False):
        """End a row that may not write any more, once it has drawn enough images."""
        at_boi = self.writer.tokens[row][-1] == self.config.boi_token_id
        if not at_boi and (is_stopped or self.must_draw[row] or len(self.written[row]) >= self.max_new_tokens):
            self.finish_reasons.setdefault(row, "stop" if is_stopped else "length")
            self.must_draw[row] = self.num_images[row] < self.min_images
            self.ended[row] = not self.must_draw[row]

    def _write(self, rows: list[int]):
        """Write one token of text in each of the rows."""
        appended: list[list[int]] = [[] for _ in range(self.batch)]
        for row, token in zip(rows, self._next_tokens(rows)):
            appended[row] = [token]
            if token == self.config.boi_token_id:
                self._end_segment(row)
            else:
                self.written[row].append(token)
                if self.streamer is not None:
                    self.streamer.put(torch.tensor([token]))
        stopped = self._stopped(rows)
        ending = [row for row in rows if self.written[row] and self.written[row][-1] in self.end_ids]
        for row in rows:
            if appended[row] != [self.config.boi_token_id]:
                self._end_if_at_limit(row, row in stopped or row in ending)
        if all(self.ended):
            # They are not read into the cache, since nothing follows.
            for row, ids in enumerate(appended):
                self.writer.tokens[row] += ids
        else:
            self.writer.append(appended)

    def _next_tokens(self, rows: list[int]) -> list[int]:
        boi = self.config.boi_token_id
        # Rows that must draw an image next use no random number, as in a batch of one.
        free = [row for row in rows if not self.must_draw[row]]
        if not free:
            return [boi] * len(rows)
        logits = self.writer.text_logits[free]
        logits[:, [self.config.eoi_token_id, self.config.image_token_id]] = -torch.inf
        for index, row in enumerate(free):
            if self.num_images[row] >= self.max_images:
                logits[index, boi] = -torch.inf
            if self.num_images[row] < self.min_images:
                logits[index, self.end_ids] = -torch.inf
        tokens = sample_codes(logits, self.temperature, **self.truncation, generator=self._generator_of(free)).tolist()
        tokens = dict(zip(free, tokens))
        return [tokens.get(row, boi) for row in rows]

    def _generator_of(self, rows: list[int]) -> Generators:
        return [self.generator[row] for row in rows] if isinstance(self.generator, Sequence) else self.generator

    def _stopped(self, rows: list[int]) -> list[int]:
        rows = [row for row in rows if self.written[row]]
        if self.stop is None or not rows:
            return []
        ids, _ = padded_rows([self.written[row] for row in rows], self.config.text_config.pad_token_id or 0)
        return [row for row, is_stopped in zip(rows, self.stop(ids, None).tolist()) if is_stopped]

    def _draw(self, rows: list[int]):
        drawing = ImageCodes(self.model, [self.schedules[row] for row in rows], self.sampling, self._generator_of(rows))
        going_on = [row for row in range(self.batch) if not self.ended[row]]
        self.writer.draw(drawing, rows, self._after_scale)
        for row in rows:
            self.num_images[row] += 1
            # Counted from the row's first image; `_output` adds the number of images in the rows before.
            self._end_segment(row, image=len(self.writer.image_tokens[row]) - 1)
            self._end_if_at_limit(row)
        if self.is_interrupted:
            self.ended = [True] * self.batch
            self.finish_reasons |= dict.fromkeys(going_on, "interrupted")

    def _after_scale(self, model: nn.Module, scale: int, state: ScaleState) -> bool:
        if self.streamer is not None:
            self.streamer.put_scale(state)
        if self.callback is not None:
            self.is_interrupted = self.callback(model, scale, state) is False
        return not self.is_interrupted

    def _end_segment(self, row: int, image: int | None = None):
        """End the current piece of a row; `<boi>` belongs to the image."""
        stop = len(self.writer.tokens[row])
        if stop > self.starts[row]:
            self.segments[row].append(Segment(self.starts[row], stop, image))
        self.starts[row] = stop

    def _output(self) -> InterleavedGenerationOutput:
        for row in range(self.batch):
            self._end_segment(row)
        finished = self.writer.finished()
        longest, above, segments = finished.input_ids.shape[1], 0, []
        for row, pieces in enumerate(self.segments):
            shift = longest - len(self.writer.tokens[row])
            segments.append(
                [Segment(p.start + shift, p.stop + shift, None if p.image is None else p.image + above) for p in pieces]
            )
            above += len(self.writer.image_tokens[row])
        reasons = [self.finish_reasons[row] for row in range(self.batch)]
        return InterleavedGenerationOutput(
            finished.input_ids, finished.attention_mask, finished.image_tokens, finished.image_grids, segments, reasons
        )
