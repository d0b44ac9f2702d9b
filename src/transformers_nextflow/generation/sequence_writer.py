"""Sequences that grow by text and by images in turn, on one key-value cache (paper, figure 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .cached_sequences import CachedSequences
from .image_codes import ImageCodes, ScaleState
from .sampling import guide_over_contexts


ScaleCallback = Callable[[nn.Module, int, ScaleState], bool | None]


@dataclass(frozen=True)
class Prompts:
    """Rows (B, L) of tokens, padded on the left, with the images in them, row by row.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L); `None` for all.
        image_tokens: (num_images, N) codes.
        image_grids: (num_images, 2) final grids.
        room: (B,) int64, how many positions may follow each row; `None` for none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    image_grids: torch.Tensor | None = None
    room: torch.Tensor | None = None

    def rows(self) -> list[list[int]]:
        """The tokens of each row, without padding."""
        if self.attention_mask is None:
            return self.input_ids.tolist()
        return [ids[keep].tolist() for ids, keep in zip(self.input_ids, self.attention_mask.bool())]

    def distinct(self) -> tuple[Prompts, torch.Tensor | None]:
        """The prompts without their repetitions, and where each row is among them (B,); `None` where all rows stay.

        Images drawn from one prompt share it, and what guidance leads away from is one prompt for all. Rows that hold
        images are not compared.
        """
        if self.image_grids is not None:
            return self, None
        mask = torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask
        rows, places = torch.cat([self.input_ids, mask], dim=1).unique(dim=0, return_inverse=True)
        if len(rows) == len(places):
            return self, None
        room = self.room
        if room is not None:
            room = room.new_zeros(len(rows)).scatter_reduce(0, places, room, "amax")
        return Prompts(*rows.chunk(2, dim=1), room=room), places


class SequenceWriter:
    """Writes on rows (B) of sequences; what a row has read or written is in the cache and never read again.

    Args:
        model: the [`NextFlowForConditionalGeneration`] that writes.
        prompts: where the rows begin. Those that draw first end with `<boi>`.
        contexts: what guidance leads away from, the fullest first: prompts of as many rows that end with `<boi>`. Every
            image of a row is compared with the same ones.

    Raises:
        ValueError: where prompts and what they have room for take more positions than the model has.

    Attributes:
        tokens: of each row all ids so far, prompts and the slots of images included.
        image_tokens, image_grids: of each row the codes (N,) and the final grids of all its images so far.
    """

    def __init__(self, model: nn.Module, prompts: Prompts, contexts: Sequence[Prompts] = ()):
        self.model, self.config = model, model.config
        self.tokens = prompts.rows()
        batch = len(self.tokens)
        self.image_grids: list[list[tuple[int, int]]] = [[] for _ in range(batch)]
        self.image_tokens: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self._take_images(prompts)

        joined, places = join_prompts((prompts, *contexts)), None
        if batch > 1:  # a single prompt differs from what it is compared with
            joined, places = joined.distinct()
        self.sequences = CachedSequences(model.model)
        self._last = self.sequences.read(
            joined.input_ids, joined.attention_mask, joined.image_tokens, joined.image_grids, joined.room
        )[:, -1:]
        if places is not None:
            self.sequences.keep(places)
            self._last = self._last[places]
        # Rows of one image stand a batch apart, the fullest context first.
        self._rows = torch.arange(len(self._last), device=model.device).view(-1, batch)
        self._start = joined.input_ids.shape[1], self.sequences.position, self._last

    def _take_images(self, prompts: Prompts):
        if prompts.image_grids is None:
            return
        images = zip(prompts.image_tokens, self.model.model.schedules_of(prompts.image_grids))
        for row, ids in enumerate(self.tokens):
            for codes, schedule in (next(images) for _ in range(ids.count(self.config.eoi_token_id))):
                self.image_tokens[row].append(codes[: schedule.num_tokens])
                self.image_grids[row].append(schedule.final_grid)

    @property
    def text_logits(self) -> torch.Tensor:
        """(B, V) of the next token of each row, over the text vocabulary."""
        return self.model.lm_head(self._last[self._rows[0], 0])

    def rows_at_boi(self) -> list[int]:
        """Rows whose last token opens an image."""
        return [row for row, ids in enumerate(self.tokens) if ids[-1] == self.config.boi_token_id]

    def append(self, tokens: Sequence[Sequence[int]]):
        """Go on with given tokens, which may be none for a row, and may end with `<boi>` but hold no image."""
        longest = max(map(len, tokens))
        if longest == 0:
            return
        for row, ids in enumerate(tokens):
            self.tokens[row] += ids
        rows = [list(ids) for ids in tokens] + [[]] * (self._rows.numel() - len(tokens))  # contexts read nothing
        input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in rows], device=self._rows.device)
        occupied = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]
        everyone = all(len(ids) == longest for ids in rows)
        self._read(input_ids, None if everyone else torch.tensor(occupied, device=self._rows.device))

    def _read(self, input_ids: torch.Tensor, occupied: torch.Tensor | None, steps: torch.Tensor | None = None):
        """Read tokens (R, n), of which those that count (R, n) stand last in their row; `None` for all."""
        last = self.sequences.read_tokens(input_ids, occupied, steps)[:, -1:]
        self._last = last if occupied is None else torch.where(occupied[:, -1:, None] > 0, last, self._last)

    def draw(
        self, drawing: ImageCodes, rows: Sequence[int], callback: ScaleCallback | None = None, go_on: bool = True
    ) -> int:
        """Draw one image in each of `rows`, which must be at `<boi>`, and close them.

        Args:
            drawing: of as many images as `rows`.
            callback: `callback(model, scale, state)` after each scale, counted from 0; `False` stops the drawing.
            go_on: whether anything follows. If not, the images are not closed, and rows that only guidance needs
                leave the cache after its last scale; nothing can be written any more.

        Returns:
            The number of scales drawn; fewer than all where the callback stopped: the images are kept as they are,
            and nothing can be written any more.
        """
        images = torch.tensor(rows, device=self._rows.device)
        readers = self._rows[:, images]
        if len(readers) > 1:
            self._refresh_contexts(images)
        hidden_states, origins = self._last[readers], self.sequences.slot_origins(readers)
        for scale in range(drawing.num_scales):
            if scale > 0:
                embeds, coordinates, occupied = drawing.slots(scale)
                hidden_states = self.sequences.read_slots(embeds, origins + coordinates, occupied, readers)
            logits = guide_over_contexts(self.model.visual_head(hidden_states).float(), drawing.guidance[scale])
            drawing.draw(scale, logits)
            if callback is not None and callback(self.model, scale, drawing.state(scale, logits)) is False:
                self._take(drawing, rows)
                return scale + 1
            if not go_on and scale == drawing.last_guided_scale < drawing.num_scales - 1:
                self.sequences.keep(self._rows[0])
                self._rows, readers, origins = self._rows[:1], readers[:1], origins[:, :1]
        self._take(drawing, rows)
        if go_on:
            self._close(drawing, rows)
        return drawing.num_scales

    def _take(self, drawing: ImageCodes, rows: Sequence[int]):
        """Enter the images into the rows' tokens, closed."""
        for row, schedule, codes in zip(rows, drawing.schedules, drawing.image_tokens):
            self.tokens[row] += [self.config.image_token_id] * schedule.num_slots(self.config.read_last_scale)
            self.tokens[row] += [self.config.eoi_token_id]
            self.image_tokens[row].append(codes[: schedule.num_tokens])
            self.image_grids[row].append(schedule.final_grid)

    def _refresh_contexts(self, images: torch.Tensor):
        """Take the rows that guidance compares back to their prompts: they know nothing of earlier images."""
        columns, position, last = self._start
        if self.sequences.cache.get_seq_length() == columns:
            return
        stale = torch.zeros(self._rows.numel(), dtype=torch.bool, device=self._rows.device)
        stale[self._rows[1:, images]] = True
        self.sequences.forget(stale, columns, position)
        self._last = torch.where(stale[:, None, None], last, self._last)

    def _close(self, drawing: ImageCodes, rows: Sequence[int]):
        """Read `<eoi>`, and before it the last scale where the model reads it."""
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
        """All that was read and written, as `forward` takes it: (B, L), padded on the left."""
        pad, device = self.config.text_config.pad_token_id or 0, self._rows.device
        longest = max(map(len, self.tokens))
        missing = [longest - len(ids) for ids in self.tokens]
        codes = [codes for row in self.image_tokens for codes in row]
        grids = [grid for row in self.image_grids for grid in row]
        return Prompts(
            input_ids=torch.tensor([[pad] * n + ids for n, ids in zip(missing, self.tokens)], device=device),
            attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in missing], device=device),
            image_tokens=nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1) if codes else None,
            image_grids=torch.tensor(grids, device=device) if grids else None,
        )


def join_prompts(parts: Sequence[Prompts]) -> Prompts:
    """Batches of different lengths as one, padded on the left."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.input_ids.shape[1] for part in parts)
    joined, masks = [], []
    for part in parts:
        mask = torch.ones_like(part.input_ids) if part.attention_mask is None else part.attention_mask
        missing = length - part.input_ids.shape[1]
        joined.append(nn.functional.pad(part.input_ids, (missing, 0), value=0))
        masks.append(nn.functional.pad(mask, (missing, 0), value=0))
    images = [part for part in parts if part.image_grids is not None]
    codes = [row for part in images for row in part.image_tokens]
    rooms = [torch.zeros_like(part.input_ids[:, 0]) if part.room is None else part.room for part in parts]
    return Prompts(
        torch.cat(joined),
        torch.cat(masks),
        nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1) if codes else None,
        torch.cat([part.image_grids for part in images]) if codes else None,
        torch.cat(rooms),
    )
