"""Sequences that grow by text and by images in turn, on one key-value cache (paper, figure 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..sequence.padding import pad_codes, padded_rows
from .cached_sequences import CachedSequences, Prompts, join_prompts
from .scale_loop import ImageCodes, ScaleCallback, draw_scales


class SequenceWriter:
    """Continues rows (B) of sequences with text and images; all that a row has read or written stays in the cache.

    Args:
        model: the [`NextFlowForConditionalGeneration`] that writes.
        prompts: the new_model of the rows. Rows that draw first end with `<boi>`.
        contexts: the prompts that guidance compares with, the most conditioned first, each with B rows that end
            with `<boi>`. Every image of a row is compared with the same ones.

    Raises:
        ValueError: if prompts and what may follow them take more positions than the model has.

    Attributes:
        tokens: for each row all ids so far, prompts and the slots of images included.
        image_tokens, image_grids: for each row the codes (N,) and the final grids of all its images so far.
    """

    def __init__(self, model: nn.Module, prompts: Prompts, contexts: Sequence[Prompts] = ()):
        self.model, self.config = model, model.config
        self.tokens = prompts.rows()
        batch = len(self.tokens)
        self.image_grids: list[list[tuple[int, int]]] = [[] for _ in range(batch)]
        self.image_tokens: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self._split_prompt_images(prompts)

        joined, places = join_prompts((prompts, *contexts)), None
        if batch > 1:  # a single prompt differs from its contexts
            joined, places = joined.distinct()
        self.sequences = CachedSequences(model.model)
        self._last = self.sequences.read(joined)[:, -1:]
        if places is not None:
            self.sequences.keep(places)
            self._last = self._last[places]
        # The rows of one image are B apart, the most conditioned context first.
        self._rows = torch.arange(len(self._last), device=model.device).view(-1, batch)
        self._start = joined.input_ids.shape[1], self.sequences.position, self._last

    def _split_prompt_images(self, prompts: Prompts):
        if prompts.image_grids is None:
            return
        images = zip(prompts.image_tokens, self.model.model.schedules_of(prompts.image_grids))
        for row, ids in enumerate(self.tokens):
            for codes, schedule in (next(images) for _ in range(ids.count(self.config.eoi_token_id))):
                self.image_tokens[row].append(codes[: schedule.num_tokens])
                self.image_grids[row].append(schedule.final_grid)

    @property
    def text_logits(self) -> torch.Tensor:
        """Logits (B, V) of the next token of each row, over the text vocabulary."""
        return self.model.lm_head(self._last[self._rows[0], 0])

    def rows_at_boi(self) -> list[int]:
        """Rows whose last token opens an image."""
        return [row for row, ids in enumerate(self.tokens) if ids[-1] == self.config.boi_token_id]

    def append(self, tokens: Sequence[Sequence[int]]):
        """Append given tokens to the rows; a row may get none, and its tokens may end with `<boi>` but hold no
        image.
        """
        if not any(tokens):
            return
        for row, ids in enumerate(tokens):
            self.tokens[row] += ids
        rows = [*tokens, *[[]] * (self._rows.numel() - len(tokens))]  # contexts read nothing
        input_ids, occupied = padded_rows(rows, 0, self._rows.device)
        self._read(input_ids, occupied if len(set(map(len, rows))) > 1 else None)

    def _read(self, input_ids: torch.Tensor, occupied: torch.Tensor | None, steps: torch.Tensor | None = None):
        """Read tokens (R, n); `occupied` (R, n) is 1 for tokens and 0 for padding on the left, `None` for no
        padding.
        """
        last = self.sequences.read_tokens(input_ids, occupied, steps)[:, -1:]
        self._last = last if occupied is None else torch.where(occupied[:, -1:, None] > 0, last, self._last)

    def draw(
        self, drawing: ImageCodes, rows: Sequence[int], callback: ScaleCallback | None = None, continues: bool = True
    ) -> int:
        """Draw one image in each of `rows`, which must be at `<boi>`, and close it with `<eoi>`.

        Args:
            drawing: the images to draw, one for each of `rows`.
            callback: `callback(model, scale, state)` after each scale, counted from 0; `False` stops the drawing.
            continues: whether anything follows. If not, the images are not closed, rows that only guidance needs leave
                the cache after the last guided scale, and nothing can be written afterwards.

        Returns:
            The number of scales drawn; fewer than all if the callback stopped the drawing: then the images are kept as
            they are, and nothing can be written afterwards.
        """
        images = torch.tensor(rows, device=self._rows.device)
        readers = self._rows[:, images]
        if len(readers) > 1:
            self._refresh_contexts(images)
        scales = draw_scales(self.model, drawing, self.sequences, self._last[readers], readers, callback, continues)
        self._append_images(drawing, rows)
        if continues and scales == drawing.num_scales:
            self._close_images(drawing, rows)
        return scales

    def _append_images(self, drawing: ImageCodes, rows: Sequence[int]):
        """Add the images, closed with `<eoi>`, to the tokens of the rows."""
        for row, schedule, codes in zip(rows, drawing.schedules, drawing.image_tokens):
            self.tokens[row] += [self.config.image_token_id] * schedule.num_slots(self.config.read_last_scale)
            self.tokens[row] += [self.config.eoi_token_id]
            self.image_tokens[row].append(codes[: schedule.num_tokens])
            self.image_grids[row].append(schedule.final_grid)

    def _refresh_contexts(self, images: torch.Tensor):
        """Return the rows of contexts to their prompts, since guidance compares without earlier images."""
        columns, position, last = self._start
        if self.sequences.cache.get_seq_length() == columns:
            return
        stale = torch.zeros(self._rows.numel(), dtype=torch.bool, device=self._rows.device)
        stale[self._rows[1:, images]] = True
        self.sequences.roll_back(stale, columns, position)
        self._last = torch.where(stale[:, None, None], last, self._last)

    def _close_images(self, drawing: ImageCodes, rows: Sequence[int]):
        """Read `<eoi>`, and before it the last scale if the model reads it."""
        read_last = self.config.read_last_scale
        places = torch.tensor(rows, device=self._rows.device)
        if read_last:
            readers, (embeds, coordinates, occupied) = self._rows[:1, places], drawing.last_slots()
            origins = self.sequences.slot_origins(readers)
            self.sequences.read_slots(embeds, origins + coordinates, occupied, readers)
        input_ids = torch.zeros(self._rows.numel(), 1, dtype=torch.long, device=self._rows.device)
        occupied, steps = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        input_ids[places], occupied[places] = self.config.eoi_token_id, 1
        counts = [[schedule.num_positions(read_last) - 1] for schedule in drawing.schedules]
        steps[places] = torch.tensor(counts, device=steps.device)
        self._read(input_ids, None if len(rows) == self._rows.numel() else occupied, steps)

    def finished(self) -> Prompts:
        """The whole sequences as inputs of `forward`: (B, L), padded on the left."""
        pad, device = self.config.text_config.pad_token_id or 0, self._rows.device
        codes = [codes for row in self.image_tokens for codes in row]
        grids = [grid for row in self.image_grids for grid in row]
        return Prompts(
            *padded_rows(self.tokens, pad, device),
            image_tokens=pad_codes(codes),
            image_grids=torch.tensor(grids, device=device) if grids else None,
        )
