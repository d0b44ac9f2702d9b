"""Batches of images of one size, of a data set with images of several."""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Iterator, Sequence

from torch.utils.data import Sampler


class OneSizeSampler(Sampler[int]):
    """Numbers of images, in an order of which each `batch_size` in turn are of one size.

    Every image comes at least once an epoch. A size whose images fill no batch has some of them twice, and some batches
    come twice where processes would have different numbers of them. The order follows from the seed and the epoch.

    Args:
        sizes: of each image.
        batch_size: of a process.
        processes: among which batches are shared out.
        seed: of the order.
    """

    def __init__(self, sizes: Sequence[Hashable], batch_size: int, processes: int = 1, seed: int = 0):
        self.batch_size, self.processes, self.seed, self.epoch = batch_size, processes, seed, 0
        self.members: dict[Hashable, list[int]] = {}
        for number, size in enumerate(sizes):
            self.members.setdefault(size, []).append(number)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        batches = sum(-(-len(numbers) // self.batch_size) for numbers in self.members.values())
        return self.batch_size * (batches + -batches % self.processes)

    def __iter__(self) -> Iterator[int]:
        chance, batches = random.Random(f"{self.seed} {self.epoch}"), []
        for numbers in self.members.values():
            again = itertools.cycle(chance.sample(numbers, len(numbers)))
            count = -(-len(numbers) // self.batch_size)
            batches += [list(itertools.islice(again, self.batch_size)) for _ in range(count)]
        chance.shuffle(batches)
        repeated = itertools.islice(itertools.cycle(batches), len(self) // self.batch_size)
        return itertools.chain.from_iterable(repeated)
