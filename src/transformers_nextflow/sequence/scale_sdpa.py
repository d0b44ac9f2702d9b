"""Attention of the scales of images: "scale_sdpa", the backbone's default, and the backends and caches it accepts.

"scale_sdpa" is scaled dot product attention without a mask. The queries of a scale attend to all keys of their sample
up to the end of that scale. So attention over whole images, causal in text and bidirectional within a scale, is
computed exactly by one call of a kernel without a mask for each run of text and each scale; padding and other samples
of the row are never read. If many small calls would take longer than one call with a mask (short rows, small images),
there is one call with a mask.

An [`AttentionPlan`] takes the place of a mask. Without one, "scale_sdpa" is transformers' "sdpa".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..utils.older_transformers import CACHE_KEYWORD
from .ragged_keys import RaggedKeys, attend_ragged


SCALE_SDPA = "scale_sdpa"
# The time to start a call, as the number of products of one channel of a query with one of a key in the same time;
# measured on CPU (a twentieth to a fifth of a millisecond), an estimate for GPUs.
CALL_COST = {"cpu": 2**19, "cuda": 2**29}
# How much longer a pair of query and key takes under a mask.
MASKED_COST = 1.25


@dataclass(frozen=True)
class Run:
    """Queries of a sample that one call reads: they attend to the sample's first `keys` keys.

    With `is_causal` the last query attends to all of these keys, and each query before it to one fewer.
    """

    queries: int
    keys: int
    is_causal: bool = False

    @property
    def pairs(self) -> int:
        return self.queries * self.keys - self.is_causal * self.queries * (self.queries - 1) // 2


@dataclass(frozen=True)
class Sample:
    """The columns of a sample in a row, and its queries, run by run; a sample without runs is padding.

    With a key-value cache only the last columns have queries.
    """

    queries: int
    keys: int
    runs: tuple[Run, ...] = ()


Row = tuple[Sample, ...]


@dataclass(frozen=True)
class AttentionPlan:
    """The calls that compute the attention of a batch.

    Args:
        groups: numbers of consecutive rows with the same samples, and these samples.
        masks: for each sample of each group the mask (1, 1, queries, keys) with which one call reads all runs; `None`
            if each run has its own call.
    """

    groups: tuple[tuple[int, Row], ...]
    masks: tuple[tuple[torch.Tensor | None, ...], ...]


def plan_attention(
    config: PreTrainedConfig, samples: torch.Tensor, block_ids: torch.Tensor | None, num_queries: int
) -> AttentionPlan | None:
    """The plan of rows whose last `num_queries` columns are read after those in a cache.

    Waits for the device once, if the columns are on one.

    Args:
        config: the config of the backbone.
        samples: (B, columns) int64, the sample of its row to which a column belongs; -1 for padding.
        block_ids: (B, columns) int64, a distinct number for each scale, -1 elsewhere; `None` for text.

    Returns:
        `None` if one mask over all rows takes less time, if the columns of a sample are not contiguous, for other
        implementations than "scale_sdpa", and in a graph that is being compiled.
    """
    if config._attn_implementation != SCALE_SDPA or torch.compiler.is_compiling():
        return None
    block_ids = torch.full_like(samples, -1) if block_ids is None else block_ids
    rows = [_row(*ids, num_queries) for ids in zip(*torch.stack([samples, block_ids]).tolist())]
    return plan_rows(config, rows, block_ids) if all(row is not None for row in rows) else None


def plan_cached(
    config: PreTrainedConfig, padding: Sequence[int], num_queries: int, columns: int, is_causal: bool, device
) -> AttentionPlan | None:
    """The plan of rows in which the last `num_queries` of `columns` attend to all but `padding` columns on the left.

    Returns `None` in the same cases as `plan_attention`.
    """
    if config._attn_implementation != SCALE_SDPA or torch.compiler.is_compiling():
        return None

    def row(left: int) -> Row:
        run = Run(num_queries, columns - left, is_causal and num_queries > 1)
        return (Sample(0, left), Sample(num_queries, columns - left, (run,)))

    return plan_rows(config, [row(left) for left in padding], torch.empty(0, device=device))


def plan_rows(config: PreTrainedConfig, rows: Sequence[Row], block_ids: torch.Tensor) -> AttentionPlan | None:
    """The plan with the cheapest calls for rows; `None` if one mask over all rows is cheaper."""
    call = CALL_COST["cpu" if block_ids.device.type == "cpu" else "cuda"] / config.hidden_size
    groups, masks, cost, first_row = [], [], 0.0, 0
    for row, same in groupby(rows):
        count = len(list(same))
        groups.append((count, row))
        masks.append([])
        start = 0
        for sample in row:
            run_by_run = sum(count * run.pairs + call for run in sample.runs)
            # A single run is a single call in any case.
            at_once = count * sample.queries * sample.keys * MASKED_COST + call
            is_masked = len(sample.runs) > 1 and at_once < run_by_run
            columns = slice(start, start + sample.keys)
            masks[-1].append(_mask(block_ids[first_row, columns], sample.queries) if is_masked else None)
            cost += at_once if is_masked else run_by_run
            start += sample.keys
        first_row += count
    queries, columns = (sum(getattr(sample, name) for sample in rows[0]) for name in ("queries", "keys"))
    if len(groups) > 1 and len(rows) * queries * columns * MASKED_COST + call < cost:
        return None
    return AttentionPlan(tuple(groups), tuple(map(tuple, masks)))


def _row(samples: list[int], block_ids: list[int], num_queries: int) -> Row | None:
    """The samples of the columns of a row; `None` if a sample is not contiguous."""
    past, start, row, seen = len(samples) - num_queries, 0, [], set()
    for sample, columns in groupby(zip(samples, block_ids), key=lambda column: column[0]):
        blocks = [block for _, block in columns]
        keys = len(blocks)
        if sample in seen:
            return None
        if sample >= 0:
            seen.add(sample)
        skipped = min(max(past - start, 0), keys)  # cached columns, which have no queries
        runs, end = [], skipped
        for block, same in groupby(blocks[skipped:]):
            length = len(list(same))
            end += length
            runs.append(Run(length, end, is_causal=block < 0 and length > 1))
        row.append(Sample(keys - skipped, keys, tuple(runs) if sample >= 0 else ()))
        start += keys
    return tuple(row)


def _mask(block_ids: torch.Tensor, num_queries: int) -> torch.Tensor:
    """The mask (1, 1, queries, keys) bool of a sample with blocks (keys,): causal, bidirectional within a block."""
    of_queries = block_ids[-num_queries:, None]
    places = torch.arange(len(block_ids), device=block_ids.device)
    same = (of_queries == block_ids) & (of_queries >= 0)
    return (same | (places <= places[-num_queries:, None]))[None, None]


def scale_sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionPlan | RaggedKeys | torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention (B, L, H, D) of queries, keys and values (B, H, L, D), by a plan, over ragged keys, or as in
    transformers' "sdpa".
    """
    if isinstance(attention_mask, RaggedKeys):
        return attend_ragged(module, query, key, value, attention_mask, **kwargs), None
    if not isinstance(attention_mask, AttentionPlan):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs.pop("is_causal", None)
    return _attend_by_plan(module, query, key, value, attention_mask, **kwargs), None


# Not compiled: compiled layers would be compiled anew for each plan.
@torch.compiler.disable
def _attend_by_plan(module, query, key, value, plan: AttentionPlan, **kwargs) -> torch.Tensor:
    counts = [count for count, _ in plan.groups]
    parts = zip(*(states.split(counts) for states in (query, key, value)), plan.groups, plan.masks)
    outputs = [_attend_row(module, q, k, v, row, masks, **kwargs) for q, k, v, (_, row), masks in parts]
    return _concatenate(outputs, 0)


def _attend_row(module, query, key, value, row: Row, masks, **kwargs) -> torch.Tensor:
    # Split and not sliced: the gradient of a slice would be as large as the whole row.
    queries = query.split([sample.queries for sample in row], dim=2)
    keys, values = (states.split([sample.keys for sample in row], dim=2) for states in (key, value))
    samples = zip(queries, keys, values, row, masks)
    return _concatenate([_attend_sample(module, *states, **kwargs) for states in samples if states[0].shape[2]], 1)


def _attend_sample(module, query, key, value, sample: Sample, mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
    if mask is not None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    if not sample.runs:
        return query.transpose(1, 2).new_zeros(query.transpose(1, 2).shape)
    parts = zip(query.split([run.queries for run in sample.runs], dim=2), sample.runs)
    outputs = [_attend(module, q, key[:, :, : run.keys], value[:, :, : run.keys], run, **kwargs) for q, run in parts]
    return _concatenate(outputs, 1)


def _attend(module, query, key, value, run: Run, **kwargs) -> torch.Tensor:
    if run.is_causal and run.queries < run.keys:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, causal_lower_right(run.queries, run.keys), dropout_p=kwargs.get("dropout", 0.0),
            scale=kwargs.get("scaling"), enable_gqa=query.shape[1] > key.shape[1],
        )  # fmt: skip
        return output.transpose(1, 2)
    return sdpa_attention_forward(module, query, key, value, None, is_causal=run.is_causal, **kwargs)[0]


def _concatenate(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class ScaleAttentionMixin:
    """Adds `bidirectional` to an attention module of transformers: its queries attend to all keys that are not masked.

    transformers' own `is_causal=False` does the same, but the backbone writes that argument into its config during the
    call. All calls on the model, also in other threads, share the config; `bidirectional` does not change it.
    """

    def forward(self, *args, bidirectional: bool = False, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        if bidirectional:
            kwargs["is_causal"] = False
        return super().forward(*args, **kwargs)


class ScaleMaskedMixin:
    """Masks and attention for the backbones of transformers. The implementation in the backbone's own config decides
    the form of a mask; the config of the model around it may name another one.
    """

    _supports_flex_attn = True
    # FlashAttention would silently drop the block mask of the scales.
    _supports_flash_attn = False

    def through_layers(
        self, hidden_states: torch.Tensor, attention_mask: dict, cache: Cache | None, **kwargs
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, D) through all layers and the norm; `attention_mask` as transformers prepares it."""
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, attention_mask=attention_mask["full_attention"], **{CACHE_KEYWORD: cache}, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_KEYWORD: cache})

    def get_correct_attn_implementation(self, requested_attention: str | None, *args, **kwargs) -> str:
        """As in transformers, but the default is "scale_sdpa" in place of "sdpa".

        Raises `ValueError` for an implementation without a mask function.
        """
        implementation = super().get_correct_attn_implementation(requested_attention, *args, **kwargs)
        if requested_attention is None and implementation == "sdpa":
            return SCALE_SDPA
        # transformers passes no mask to an implementation without a mask function. Continuous batching makes its own.
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS and not implementation.startswith("paged|"):
            raise ValueError(
                f"attn_implementation={implementation!r} has no mask function, so it would not know the scales of "
                "images; register one under its name with AttentionMaskInterface."
            )
        return implementation


def is_empty(cache: Cache | None) -> bool:
    """Whether a cache is certainly empty. A cache whose length is on the device counts as not empty, since reading the
    length would wait for the device.

    The paged cache of continuous batching is not handled here: it comes with its own positions and masks.
    """
    length = cache.get_seq_length() if isinstance(cache, Cache) else 0
    return not torch.is_tensor(length) and length == 0


def check_cache(cache: Cache | None, config: PreTrainedConfig):
    """Raises `ValueError` for a cache that the attention of `config` (the backbone's) cannot read."""
    if isinstance(cache, Cache) and cache.is_compileable and config._attn_implementation == "flex_attention":
        # Each layer computes the mask anew, after the first layer has already advanced the position of the queries.
        raise ValueError("flex_attention cannot read a static cache; take another, or attn_implementation='sdpa'.")


AttentionInterface.register(SCALE_SDPA, scale_sdpa_attention_forward)
AttentionMaskInterface.register(SCALE_SDPA, sdpa_mask)
