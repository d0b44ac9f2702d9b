"""Packing of samples to equal length or equal compute (paper, section 3.3): with little padding, and with processes
that end their steps together.

A pack is one row of samples that do not attend to each other; see `sequence/packed_attention.py`.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from ..configuration_nextflow import NextFlowConfig
from ..data.rows import ROW_NUMBER
from ..scale_schedule import ScaleSchedule


PACKINGS = ("padding", "length", "compute")
# Samples that are packed together: enough to fill packs well, few enough to keep the order random.
WINDOW = 1024
# A pack that is filled to this share does not wait for further samples.
FULL = 0.97


@dataclass(frozen=True)
class SampleSize:
    """The numbers on which a sample's cost depends: positions, trained positions, and the schedules of its images."""

    length: int
    trained: int
    schedules: tuple[ScaleSchedule, ...]


@dataclass(frozen=True)
class CostModel:
    """The compute of a sample, in units of the cost of one position in the linear layers of the backbone.

    `cost = length + head · trained + attention · pairs`, where `pairs` counts the (query, key) pairs of the sample's
    own schedule: n (n + 1) / 2 of causal attention, and m (m - 1) / 2 more for each grid of m slots.

    Args:
        head: cost of one trained position in the head and the loss.
        attention: cost of one pair in all layers.
    """

    head: float
    attention: float

    @classmethod
    def from_config(cls, config: NextFlowConfig) -> CostModel:
        """From the counts of multiplications in the model."""
        text = config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
        layer = text.hidden_size * (heads * head_dim + 3 * text.intermediate_size)
        linear = text.num_hidden_layers * layer
        return cls(
            # The fused loss computes its logits twice.
            head=4 / 3 * text.hidden_size * config.vocab_size / linear,
            attention=2 * text.num_hidden_layers * text.num_attention_heads * head_dim / linear,
        )

    def cost(self, size: SampleSize, read_last_scale: bool = False) -> float:
        return self.of_pack([size.length], size.trained, size.schedules, read_last_scale)

    def of_pack(
        self, lengths: Sequence[int], trained: int, schedules: Iterable[ScaleSchedule], read_last_scale: bool = False
    ) -> float:
        """The cost of samples with these lengths, and together with these trained positions and images."""
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        for schedule in schedules:
            pairs += sum(h * w * (h * w - 1) // 2 for h, w in schedule.slot_grids(read_last_scale))
        return sum(lengths) + self.head * trained + self.attention * pairs


@dataclass
class _Pack:
    free: float
    samples: list = field(default_factory=list)


def pack(samples: Iterable, costs: Iterable[float], budget: float) -> Iterator[list]:
    """Lists of samples whose costs add up to at most the budget, and to little less: best fit, the largest first.

    Samples are packed in windows of `WINDOW`; packs with room left wait for one more window.
    """
    waiting: list[_Pack] = []
    with_costs = zip(samples, costs)
    while window := list(itertools.islice(with_costs, WINDOW)):
        packs = _best_fit(window, budget, waiting)
        is_old = {id(pack) for pack in waiting}
        done = [p for p in packs if id(p) in is_old or p.free <= (1 - FULL) * budget]
        waiting = [p for p in packs if id(p) not in is_old and p.free > (1 - FULL) * budget]
        yield from (p.samples for p in done)
    yield from (p.samples for p in waiting)


def _best_fit(window: list[tuple], budget: float, packs: list[_Pack]) -> list[_Pack]:
    """The packs, filled with the window's (sample, cost), and new packs for samples that fit into none."""
    by_room = sorted(packs, key=lambda p: p.free)
    for sample, cost in sorted(window, key=lambda item: -item[1]):
        place = bisect.bisect_left(by_room, cost, key=lambda p: p.free)
        chosen = by_room.pop(place) if place < len(by_room) else _Pack(budget)
        chosen.samples.append(sample)
        chosen.free -= cost
        bisect.insort(by_room, chosen, key=lambda p: p.free)
    return by_room


def checked_costs(rows: Iterable, cost: Callable[[Any], float], budget: float) -> Iterator[float]:
    """The cost of each row. Raises `ValueError` for one that costs more than the budget."""
    for number, row in enumerate(rows):
        value = cost(row)
        if value > budget:
            number = row.get(ROW_NUMBER, number) if isinstance(row, dict) else number
            raise ValueError(
                f"Row {number} costs {math.ceil(value)}, more than the packing_budget of {budget}; give a budget "
                "of at least that, or leave such rows out."
            )
        yield value


class PackedDataset(Dataset):
    """Packs of the rows of a dataset with a length; an item is a list of rows, a batch is one item.

    The rows are divided among packs once, in the same way in every process; samplers shuffle the packs.

    Args:
        rows: the dataset; every row is read once here, to know its cost.
        cost: of a row.
        budget: of a pack.
        seed: of the order in which rows are packed.
        sizes: for each row in order what `cost` takes in place of the row.

    Raises:
        ValueError: for a row that costs more than the budget; the message names it.
    """

    def __init__(self, rows, cost: Callable[[Any], float], budget: float, seed: int = 0, sizes: Iterable | None = None):
        self.rows = rows
        costs = list(checked_costs(rows if sizes is None else sizes, cost, budget))
        order = list(range(len(costs)))
        random.Random(seed).shuffle(order)
        self.packs = list(pack(order, (costs[i] for i in order), budget))
        self.costs = [sum(costs[i] for i in indices) for indices in self.packs]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict]:
        return [self.rows[i] for i in self.packs[index]]


class PackedStream(IterableDataset):
    """Packs of the rows of a stream, in their order except within windows of `WINDOW` rows; arguments as in
    `PackedDataset`.
    """

    def __init__(self, rows: Iterable[dict], cost: Callable[[dict], float], budget: float):
        self.rows, self.cost, self.budget = rows, cost, budget

    def set_epoch(self, epoch: int):
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[dict]]:
        rows, again = itertools.tee(self.rows)
        return pack(rows, checked_costs(again, self.cost, self.budget), self.budget)
