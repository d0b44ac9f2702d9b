"""A batch of sequences on one key-value cache: whole prompts first, then tokens and slots as they are generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from .sequence_layout import layout_sequence


class CachedSequences:
    """What rows (R) have read so far, and where each goes on.

    Rows may sit out a reading. The cache grows by its columns all the same; they do not count for those rows.

    Args:
        model: the [`NextFlowModel`] that reads.

    Attributes:
        position: (R, 1) float32, of the token or `<boi>` that each row read last. Slots do not change it.
        valid: (R, past) int64, the columns that count; `None` while all do.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.cache = DynamicCache(config=model.config.text_config)
        self.position: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None

    def read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read prompts (R, L), padded on the left, with whole pictures; returns hidden states (R, L, D)."""
        schedules = self.model.schedules_of(image_grids)
        layout = layout_sequence(input_ids, attention_mask, schedules, self.model.config)
        self.position = layout.position_ids[0, :, -1:]
        # A mask of ones would only keep the kernels from their fast path.
        self.valid = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=self.valid,
            position_ids=layout.position_ids,
            past_key_values=self.cache,
            image_tokens=image_tokens,
            image_grids=image_grids,
            layout=layout,
            use_cache=True,
        )
        return outputs.last_hidden_state

    def read_slots(
        self, embeds: torch.Tensor, coordinates: torch.Tensor, occupied: torch.Tensor | None
    ) -> torch.Tensor:
        """Read the slots of a scale, which see each other and all before them.

        Args:
            embeds: (R, n, D).
            coordinates: (3, R, n) behind `<boi>`: scale, row, column.
            occupied: (R, n) int64, which slots are a row's own; `None` for all.

        Returns:
            Hidden states (R, n, D).
        """
        # Where slots lie in their grid does not depend on what was read before the picture.
        origin = nn.functional.pad(self.position[None], (0, 0, 0, 0, 0, 2))
        return self._read(embeds, coordinates + origin, occupied)

    def keep(self, rows: Sequence[int]):
        """Go on with some of the rows."""
        rows = torch.as_tensor(rows, device=self.position.device)
        self.cache.batch_select_indices(rows)
        self.position = self.position[rows]
        if self.valid is not None:
            self.valid = self.valid[rows]

    def _read(self, embeds: torch.Tensor, position_ids: torch.Tensor, occupied: torch.Tensor | None) -> torch.Tensor:
        if self.valid is None and occupied is not None:
            self.valid = occupied.new_ones(len(occupied), self.cache.get_seq_length())
        if self.valid is not None:
            occupied = self.valid.new_ones(embeds.shape[:2]) if occupied is None else occupied
            self.valid = torch.cat([self.valid, occupied], dim=1)
        outputs = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": self._mask(embeds)},
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            is_causal=False,
        )
        return outputs.last_hidden_state

    def _mask(self, embeds: torch.Tensor) -> torch.Tensor | None:
        """What is read at once sees itself and every valid column before it."""
        count = embeds.shape[1]
        implementation = self.model.config._attn_implementation
        if implementation == "flex_attention":
            past = self.cache.get_seq_length()
            blocks = torch.full((len(embeds), past + count), -1, device=embeds.device)
            blocks[:, past:] = 0
            return create_causal_mask(
                config=self.model.config.text_config,
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(blocks) if self.valid is None else self.valid,
                past_key_values=self.cache,
                block_sequence_ids=blocks,
            )
        if self.valid is None:
            return None
        keep = self.valid[:, None, None, :].bool()
        if implementation == "sdpa":
            return keep.expand(-1, -1, count, -1)
        return torch.zeros_like(keep, dtype=embeds.dtype).masked_fill(~keep, torch.finfo(embeds.dtype).min)
