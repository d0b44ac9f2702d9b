"""Text and pictures generated in turn: who writes, who draws, where a row ends, and what is told on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from queue import Queue

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StopStringCriteria, TextIteratorStreamer
from transformers.utils import ModelOutput

from .sampling_nextflow import Generators, ImageSampling, draw_codes
from .scale_drawing import Drawing, ScaleState
from .scale_schedule import ScaleSchedule
from .sequence_writer import Prompts, SequenceWriter


MODALITIES = ("any", "text", "image")
DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Segment:
    """A piece that was generated: columns `start` to `stop` of its row in `InterleavedGenerationOutput.input_ids`.

    `image` counts the pictures of `image_tokens` where the piece is one, `<boi>` to `<eoi>`; it is `None` for text.
    """

    start: int
    stop: int
    image: int | None = None


@dataclass
class InterleavedGenerationOutput(ModelOutput):
    """Finished sequences, prompts included, in the form that `forward` takes.

    Args:
        input_ids, attention_mask: (B, L), padded on the left.
        image_tokens: (num_images, N) codes of all pictures, row by row, padded with -1; `None` without pictures.
        image_grids: (num_images, 2) final grids.
        segments: of each row what was generated, in order.
    """

    input_ids: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    image_tokens: torch.LongTensor | None = None
    image_grids: torch.LongTensor | None = None
    segments: list[list[Segment]] | None = None


class InterleavedStreamer(TextIteratorStreamer):
    """What a row generates, as it comes: pieces of text (`str`), and after each scale a [`ScaleState`], whose
    `preview()` is the picture so far.

    >>> streamer = InterleavedStreamer(processor.tokenizer)
    >>> Thread(target=model.generate_interleaved, kwargs={**inputs, "streamer": streamer}).start()
    >>> for piece in streamer: ...

    Args:
        tokenizer: turns tokens to text.
        timeout: seconds to wait for the next piece; `None` waits for ever.
        decode_kwargs: of `tokenizer.decode`.
    """

    text_queue: Queue

    def put_scale(self, state: ScaleState):
        """A scale was drawn; text before it is given out first."""
        self._flush()
        self.text_queue.put(state, timeout=self.timeout)

    def _flush(self):
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :]
        self.token_cache, self.print_len = [], 0
        if text:
            self.on_finalized_text(text)


class InterleavedLoop:
    """The rows (B) of a batch on their way to their ends. See `generate_interleaved` for the arguments.

    Raises:
        ValueError: for arguments out of range or that do not match the rows.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Prompts,
        contexts: Sequence[Prompts],
        *,
        modality: str,
        max_images: int,
        schedules: Sequence[ScaleSchedule] | None,
        sampling: ImageSampling,
        generator: Generators,
        text: GenerationConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        streamer: InterleavedStreamer | None,
    ):
        self.batch = len(prompts.input_ids)
        self.max_new_tokens = text.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        if modality not in MODALITIES:
            raise ValueError(f"modality must be one of {MODALITIES}, got {modality!r}.")
        if max_images < 0:
            raise ValueError(f"max_images must be at least 0, got {max_images}.")
        if isinstance(generator, Sequence) and len(generator) != self.batch:
            raise ValueError(f"{len(generator)} generators came with {self.batch} rows; give one for all or each.")
        if text.stop_strings is not None and tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: pass tokenizer=processor.tokenizer.")
        if streamer is not None and self.batch > 1:
            raise ValueError(f"A streamer follows one row, got {self.batch}; stream one prompt at a time.")
        self.model, self.config = model, model.config
        self.max_images = 0 if modality == "text" else max_images
        self.draws_only = modality == "image"
        self.schedules, self.sampling, self.generator, self.streamer = schedules, sampling, generator, streamer
        self.temperature = (1.0 if text.temperature is None else text.temperature) if text.do_sample else 0
        self.truncation = {"top_k": text.top_k, "top_p": 1.0 if text.top_p is None else text.top_p}
        ends = text.eos_token_id if text.eos_token_id is not None else self.config.text_config.eos_token_id
        self.end_ids = set(ends if isinstance(ends, list | tuple) else [ends])
        self.stop = StopStringCriteria(tokenizer, text.stop_strings) if text.stop_strings is not None else None

        self.writer = SequenceWriter(model, prompts, contexts)
        self.written: list[list[int]] = [[] for _ in range(self.batch)]
        self.drawn = [0] * self.batch
        self.ended = [False] * self.batch
        self.starts = [len(ids) for ids in self.writer.tokens]
        self.pieces: list[list[Segment]] = [[] for _ in range(self.batch)]

    def run(self) -> InterleavedGenerationOutput:
        for row in self.writer.rows_at_boi():
            if self.drawn[row] >= self.max_images:
                raise ValueError(
                    f"Row {row} ends with <boi> and may draw {self.max_images} pictures; raise max_images, or end the "
                    "prompt before <boi>."
                )
            self.starts[row] -= 1
        while not all(self.ended):
            at_boi = self.writer.rows_at_boi()
            writing = [row for row in range(self.batch) if not self.ended[row] and row not in at_boi]
            if writing:
                self._write(writing)
            else:
                self._draw([row for row in at_boi if not self.ended[row]])
        if self.streamer is not None:
            self.streamer.end()
        return self._output()

    def _write(self, rows: list[int]):
        """One token of text in each of the rows."""
        tokens = self._next_tokens(rows)
        appended: list[list[int]] = [[] for _ in range(self.batch)]
        for row, token in zip(rows, tokens):
            if self.streamer is not None and token != self.config.boi_token_id:
                self.streamer.put(torch.tensor([token]))
            appended[row] = [token]
            if token == self.config.boi_token_id:
                self._cut(row)
                continue
            self.written[row].append(token)
            self.ended[row] = token in self.end_ids or len(self.written[row]) >= self.max_new_tokens
        if self.stop is not None:
            for row in self._stopped(rows):
                self.ended[row] = True
        if all(self.ended):
            # Nothing follows that would need them in the cache.
            for row, ids in enumerate(appended):
                self.writer.tokens[row] += ids
        else:
            self.writer.append(appended)

    def _next_tokens(self, rows: list[int]) -> list[int]:
        boi = self.config.boi_token_id
        if self.draws_only:
            return [boi] * len(rows)
        logits = self.writer.text_logits[rows]
        logits[:, [self.config.eoi_token_id, self.config.image_token_id]] = -torch.inf
        for index, row in enumerate(rows):
            if self.drawn[row] >= self.max_images:
                logits[index, boi] = -torch.inf
        generator = [self.generator[row] for row in rows] if isinstance(self.generator, Sequence) else self.generator
        return draw_codes(logits, self.temperature, **self.truncation, generator=generator).tolist()

    def _stopped(self, rows: list[int]) -> list[int]:
        longest = max(len(self.written[row]) for row in rows)
        pad = self.config.text_config.pad_token_id or 0
        ids = [[pad] * (longest - len(self.written[row])) + self.written[row] for row in rows]
        if longest == 0:
            return []
        return [row for row, done in zip(rows, self.stop(torch.tensor(ids), None).tolist()) if done]

    def _draw(self, rows: list[int]):
        schedules = [self.schedules[row] if self.schedules is not None else self._schedule_of(row) for row in rows]
        generator = [self.generator[row] for row in rows] if isinstance(self.generator, Sequence) else self.generator
        drawing = Drawing(self.model, schedules, self.sampling, generator)
        callback = None
        if self.streamer is not None:

            def callback(model, scale, state):
                self.streamer.put_scale(state)

        self.writer.draw(drawing, rows, callback)
        for row in rows:
            self.drawn[row] += 1
            # Counted from the row's first picture; `_output` knows how many lie in the rows above.
            self._cut(row, image=len(self.writer.image_tokens[row]) - 1)
            self.ended[row] = self.draws_only and self.drawn[row] >= self.max_images

    def _schedule_of(self, row: int) -> ScaleSchedule:
        if self.writer.image_grids[row]:
            return self.model.model.schedules_of(torch.tensor(self.writer.image_grids[row][-1:]))[0]
        return self.config.vq_config.scale_schedules.build()

    def _cut(self, row: int, image: int | None = None):
        """Close the piece that the row is at; `<boi>` belongs to the picture."""
        stop = len(self.writer.tokens[row])
        if stop > self.starts[row]:
            self.pieces[row].append(Segment(self.starts[row], stop, image))
        self.starts[row] = stop

    def _output(self) -> InterleavedGenerationOutput:
        for row in range(self.batch):
            self._cut(row)
        finished = self.writer.finished()
        longest, above, segments = finished.input_ids.shape[1], 0, []
        for row, pieces in enumerate(self.pieces):
            shift = longest - len(self.writer.tokens[row])
            segments.append(
                [Segment(p.start + shift, p.stop + shift, None if p.image is None else p.image + above) for p in pieces]
            )
            above += len(self.writer.image_tokens[row])
        return InterleavedGenerationOutput(
            finished.input_ids, finished.attention_mask, finished.image_tokens, finished.image_grids, segments
        )
