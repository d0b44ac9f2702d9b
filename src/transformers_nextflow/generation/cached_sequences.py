"""A batch of sequences on one key-value cache: whole prompts first, then tokens and slots as they are generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, eager_mask, sdpa_mask

from ..sequence.layout import check_new_positions
from ..sequence.padding import pad_codes
from ..sequence.scale_sdpa import plan_cached
from ..utils.older_transformers import CACHE_KEYWORD


@dataclass(frozen=True)
class Prompts:
    """Rows (B, L) of tokens, padded on the left, with the images in them, row by row.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L); `None` for no padding.
        image_tokens: (num_images, N) codes.
        image_grids: (num_images, 2) final grids.
        max_new_positions: (B,) int64, the largest number of positions after each row; `None` for none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    image_grids: torch.Tensor | None = None
    max_new_positions: torch.Tensor | None = None

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, torch.Tensor], prefix: str = "") -> Prompts:
        """The prompts among the arguments of `generate_images`, whose names begin with `prefix`."""
        names = ("input_ids", "attention_mask", "image_tokens", "image_grids")
        return cls(*(inputs.get(prefix + name) for name in names))

    @property
    def mask(self) -> torch.Tensor:
        """(B, L) int64, 1 for tokens, 0 for padding."""
        return torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask

    def rows(self) -> list[list[int]]:
        """The tokens of each row, without padding."""
        if self.attention_mask is None:
            return self.input_ids.tolist()
        return [ids[keep].tolist() for ids, keep in zip(self.input_ids, self.attention_mask.bool())]

    def distinct(self) -> tuple[Prompts, torch.Tensor | None]:
        """The prompts without repetitions, and the index (B,) of each row among them; `None` if no row is removed.

        Images drawn from one prompt share it, and the negative prompt is mostly the same for all. Rows with images are
        not compared.
        """
        if self.image_grids is not None:
            return self, None
        rows, places = torch.cat([self.input_ids, self.mask], dim=1).unique(dim=0, return_inverse=True)
        if len(rows) == len(places):
            return self, None
        most = self.max_new_positions
        if most is not None:
            most = most.new_zeros(len(rows)).scatter_reduce(0, places, most, "amax")
        return Prompts(*rows.chunk(2, dim=1), max_new_positions=most), places


def join_prompts(parts: Sequence[Prompts]) -> Prompts:
    """Several batches of prompts, also of different lengths, as one."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.input_ids.shape[1] for part in parts)

    def joined(name: str) -> torch.Tensor:
        values = [getattr(part, name) for part in parts]
        return torch.cat([nn.functional.pad(value, (length - value.shape[1], 0), value=0) for value in values])

    images = [part for part in parts if part.image_grids is not None]
    most = [part.max_new_positions for part in parts]
    most = [torch.zeros_like(part.input_ids[:, 0]) if own is None else own for part, own in zip(parts, most)]
    return Prompts(
        joined("input_ids"),
        joined("mask"),
        pad_codes([row for part in images for row in part.image_tokens]),
        torch.cat([part.image_grids for part in images]) if images else None,
        torch.cat(most),
    )


class CachedSequences:
    """The key-value cache of a batch of rows (R), and the position at which each row continues.

    Rows may be masked out of a forward pass. The cache still grows by the columns of the pass; they are masked for
    those rows.

    Args:
        model: the [`NextFlowModel`] that reads.

    Attributes:
        position: (R, 1) float32, the position of the token that each row read last; slots do not change it.
        valid: (R, past) int64, 1 for the columns that are not masked; `None` while none is masked.
        padding: for each row how many columns on its left are masked; `None` if other columns are masked too.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.cache = DynamicCache(config=model.language_model.config)
        self.position: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.padding: list[int] | None = None

    def read(self, prompts: Prompts) -> torch.Tensor:
        """Read prompts (R, L) with whole images; returns hidden states (R, L, D).

        Raises:
            ValueError: if the prompts and the `max_new_positions` after them take more positions than the model has.
        """
        input_ids, mask, images = prompts.input_ids, prompts.attention_mask, prompts.image_tokens
        layout = self.model.layout_batch(input_ids, mask, image_tokens=images, image_grids=prompts.image_grids)
        self.position = layout.position_ids[0, :, -1:]
        if prompts.max_new_positions is not None:
            check_new_positions(layout, prompts.max_new_positions, self.model.config)
        self._begin(len(input_ids), mask)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=self.valid,
            position_ids=layout.position_ids,
            past_key_values=self.cache,
            image_tokens=images,
            layout=layout,
            use_cache=True,
        )
        return outputs.last_hidden_state

    def _begin(self, rows: int, attention_mask: torch.Tensor | None):
        """Start with the mask of prompts that are padded on the left."""
        self.padding, self.valid = [0] * rows, None
        # A mask of only ones would prevent the fast path of the kernels.
        if attention_mask is not None and not bool(attention_mask.all()):
            empty = attention_mask == 0
            is_left = not bool((empty[:, 1:] & ~empty[:, :-1]).any())
            self.padding, self.valid = empty.sum(1).tolist() if is_left else None, attention_mask

    def slot_origins(self, rows: torch.Tensor) -> torch.Tensor:
        """The origins (3, C, B, 1) of the slots' coordinates of images (B), in the `rows` (C, B) that read them."""
        # The row and column of a slot do not depend on what was read before the image.
        return nn.functional.pad(self.position[rows][None], (0, 0, 0, 0, 0, 0, 0, 2))

    def read_slots(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, occupied: torch.Tensor | None, rows: torch.Tensor
    ) -> torch.Tensor:
        """Read a scale of each image (B); its slots attend to each other and to all before them.

        Args:
            embeds: (B, n, D).
            position_ids: (3, C, B, n), scale, row, column: the slots' coordinates, which start from `slot_origins`.
            occupied: (B, n) int64, 1 for the slots of an image, 0 for padding; `None` for no padding.
            rows: (C, B) int64, ascending: the rows that read each image, one for each context of guidance. The others
                are masked out.

        Returns:
            Hidden states (C, B, n, D).
        """
        contexts, images, count = *rows.shape, embeds.shape[1]
        position_ids = position_ids.flatten(1, 2)
        if contexts > 1:
            # Six times faster than `repeat`.
            embeds = embeds.expand(contexts, -1, -1, -1).flatten(0, 1)
            occupied = None if occupied is None else occupied.expand(contexts, -1, -1).flatten(0, 1)
        if rows.numel() == len(self.position):
            return self._read(embeds, position_ids, occupied).unflatten(0, (contexts, images))
        readers = rows.flatten()
        occupied = readers.new_ones(len(readers), count) if occupied is None else occupied
        hidden_states = self._read(
            self._scatter_rows(embeds, readers),
            self._scatter_rows(position_ids.transpose(0, 1), readers).transpose(0, 1),
            self._scatter_rows(occupied, readers),
        )
        return hidden_states[rows]

    def read_tokens(
        self, input_ids: torch.Tensor, occupied: torch.Tensor | None = None, steps: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read tokens (R, n) causally, as text.

        Args:
            input_ids: (R, n).
            occupied: (R, n) int64, 1 for tokens, 0 for padding, which is on the left; `None` for no padding.
            steps: (R, n) int64, how many positions each token is after the one before; default 1. `<eoi>` is as many
                positions after `<boi>` as its image has scales.

        Returns:
            Hidden states (R, n, D).
        """
        steps = torch.ones_like(input_ids) if steps is None else steps
        if occupied is not None:
            steps = steps * occupied
        positions = self.position + steps.cumsum(1)
        self.position = positions[:, -1:]
        embeds = self.model.language_model.embed_tokens(input_ids)
        return self._read(embeds, positions.expand(3, -1, -1), occupied, is_causal=True)

    def roll_back(self, row_mask: torch.Tensor, start: int, position: torch.Tensor):
        """Return rows (R,) bool to the state in which they had read `start` columns and were at `position` (R, 1)."""
        if self.valid is None:
            self.valid = row_mask.new_ones(len(row_mask), self.cache.get_seq_length(), dtype=torch.long)
        self.valid[row_mask, start:] = 0
        self.padding = None
        self.position = torch.where(row_mask[:, None], position, self.position)

    def keep(self, rows: Sequence[int]):
        """Continue with these rows, in this order; a row that is named several times is repeated."""
        rows = torch.as_tensor(rows, device=self.position.device)
        self.cache.batch_select_indices(rows)
        self.position = self.position[rows]
        if self.valid is not None:
            self.valid = self.valid[rows]
        if self.padding is not None:
            self.padding = [self.padding[row] for row in rows.tolist()]

    def _scatter_rows(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Values (r, …) of some rows as (R, …), with zeros for the other rows."""
        return values.new_zeros(len(self.position), *values.shape[1:]).index_copy(0, rows, values)

    def _read(
        self,
        embeds: torch.Tensor,
        position_ids: torch.Tensor,
        occupied: torch.Tensor | None,
        is_causal: bool = False,
        **options,
    ) -> torch.Tensor:
        if occupied is not None:
            self.padding = None
        if self.valid is None and occupied is not None:
            self.valid = occupied.new_ones(len(occupied), self.cache.get_seq_length())
        if self.valid is not None and occupied is None:
            self.valid = nn.functional.pad(self.valid, (0, embeds.shape[1]), value=1)
        elif self.valid is not None:
            self.valid = torch.cat([self.valid, occupied], dim=1)
        outputs = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": self._mask(embeds, is_causal)},
            position_ids=position_ids,
            **{CACHE_KEYWORD: self.cache},
            use_cache=True,
            bidirectional=True,  # causal passes have a mask
            **options,
        )
        return outputs.last_hidden_state

    def _mask(self, embeds: torch.Tensor, is_causal: bool) -> torch.Tensor | None:
        """The mask of one pass: its tokens attend to all valid columns before, and to each other, causally or not."""
        config, count = self.model.language_model.config, embeds.shape[1]
        form = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
        is_causal = is_causal and count > 1
        if self.padding is not None and (self.valid is not None or is_causal):
            columns = self.cache.get_seq_length() + count
            plan = plan_cached(config, self.padding, count, columns, is_causal, embeds.device)
            if plan is not None:
                return plan
        if is_causal or form not in (sdpa_mask, eager_mask):
            past = self.cache.get_seq_length()
            blocks = torch.full((len(embeds), past + count), -1, device=embeds.device)
            blocks[:, past:] = 0
            return create_causal_mask(
                config=config,
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(blocks) if self.valid is None else self.valid,
                **{CACHE_KEYWORD: self.cache},
                block_sequence_ids=None if is_causal else blocks,
            )
        if self.valid is None:
            return None
        keep = self.valid[:, None, None, :].bool()
        if form is sdpa_mask:
            return keep.expand(-1, -1, count, -1)
        return torch.zeros_like(keep, dtype=embeds.dtype).masked_fill(~keep, torch.finfo(embeds.dtype).min)
