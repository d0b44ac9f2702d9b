"""Mixtures: endless streams of rows from several weighted sources, of which each process reads only its own share."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from ..utils.short_repr import short_repr
from ..utils.typed_values import check_types, is_finite_number
from .columns import Columns, ConversationRows
from .parquet_rows import ParquetRows, parquet_files
from .rows import ROW_NUMBER, ROW_ROOT
from .sources import open_rows


if TYPE_CHECKING:
    import datasets

# The number of consecutive rows that are read together.
BLOCK = 1000
# The number of blocks of a source that are in memory at once, and whose rows are shuffled together.
POOL = 4


class Block(NamedTuple):
    """Rows `start` to `stop` of a source; `group` is the row group of a Parquet file that holds them."""

    start: int
    stop: int
    group: int | None


class Source:
    """A source of rows that are read by number.

    Args:
        name: name of the source in the mixture.
        rows: the rows.
        root: the folder to which paths of their images are relative.
    """

    def __init__(self, name: str, rows: Sequence[dict], root: Path):
        self.name, self.rows, self.root = name, rows, root

    @property
    def size(self) -> int:
        return len(self.rows)

    def check_shares(self, shares: int):
        """Raises `ValueError` if there are fewer rows than shares."""
        if len(self.rows) < shares:
            raise ValueError(
                f"{self.name} has {len(self.rows)} rows for {shares} readers (processes times dataloader_num_workers); "
                "use fewer, or leave it out of the mixture."
            )

    def blocks(self, share: int, shares: int) -> list[Block]:
        """The rows of a share, which are consecutive, in blocks. Shares differ by one row at most, so all rows come
        equally often, though readers repeat their shares without waiting for each other.
        """
        start, stop = (len(self.rows) * end // shares for end in (share, share + 1))
        if self._table is None:
            return [Block(first, min(first + BLOCK, stop), None) for first in range(start, stop, BLOCK)]
        groups = enumerate(itertools.pairwise(self._table.starts))
        blocks = [Block(max(start, first), min(stop, last), group) for group, (first, last) in groups]
        return [block for block in blocks if block.start < block.stop]

    def read(self, block: Block) -> Sequence[dict]:
        """The rows of a block, by their numbers in it."""
        if block.group is None:
            return _Part(self.rows, block.start)
        rows = _Part(self._table.read_group(block.group), block.start - self._table.starts[block.group])
        if isinstance(self.rows, ConversationRows):
            return ConversationRows(rows, self.rows.columns, self.rows.classes)
        return rows

    @property
    def _table(self) -> ParquetRows | None:
        rows = self.rows.rows if isinstance(self.rows, ConversationRows) else self.rows
        return rows if isinstance(rows, ParquetRows) else None

    def stream(self, share: int, shares: int, seed: int) -> Iterator[tuple[str, dict]]:
        """The rows of a share, repeated endlessly in ever new orders, with a name for each reading of a row."""
        own = self.blocks(share, shares)
        for passed in itertools.count():
            chance = random.Random(f"{seed} {self.name} {share} {shares} {passed}")
            order = chance.sample(own, len(own))
            for start in range(0, len(order), POOL):
                pool = [(block, self.read(block)) for block in order[start : start + POOL]]
                places = [(rows, n, block.start) for block, rows in pool for n in range(block.stop - block.start)]
                chance.shuffle(places)
                for rows, place, first in places:
                    number = f"{first + place} of {self.name}"
                    held = {ROW_NUMBER: number, ROW_ROOT: str(self.root)}
                    yield f"{number} (reading {passed + 1})", rows[place] | held


class StreamedSource:
    """A stream of `datasets`, such as WebDataset tars, whose files are divided among readers; arguments as in
    `Source`.
    """

    def __init__(self, name: str, rows: datasets.IterableDataset, root: Path):
        self.name, self.rows, self.root = name, rows, root

    @property
    def size(self) -> int:
        """The number of its files."""
        return self.rows.num_shards

    def check_shares(self, shares: int):
        """Raises `ValueError` if there are fewer files than shares."""
        if self.rows.num_shards < shares:
            raise ValueError(
                f"{self.name} has {self.rows.num_shards} files for {shares} readers (processes times "
                "dataloader_num_workers), which each read their own; use fewer readers, or divide it into more files."
            )

    def stream(self, share: int, shares: int, seed: int) -> Iterator[tuple[str, dict]]:
        """As in `Source`; shuffled within `BLOCK` rows.

        Raises:
            ValueError: if the files of the share hold no rows.
        """
        # `datasets` divides the files of a process among its workers itself.
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        rows = self.rows.shard(shares // workers, share // workers, contiguous=False)
        rows = rows.shuffle(seed=seed, buffer_size=BLOCK)
        for passed in itertools.count():
            rows.set_epoch(passed)
            named = None
            for number, row in enumerate(rows):
                named = f"{number} of {self.name}, share {share}"
                yield f"{named} (reading {passed + 1})", row | {ROW_NUMBER: named, ROW_ROOT: str(self.root)}
            if named is None:
                raise ValueError(f"The files of {self.name} that reader {share} has to itself hold no rows.")


class _Part(Sequence):
    """The rows from a number on."""

    def __init__(self, rows: Sequence[dict], first: int):
        self.rows, self.first = rows, first

    def __len__(self) -> int:
        return len(self.rows) - self.first

    def __getitem__(self, index: int) -> dict:
        return self.rows[self.first + index]


class Mixture(IterableDataset):
    """Rows that are sampled from sources by their weights, without end.

    The rows and their order follow from `seed`, the share and the number of readers. Each process, and each worker of
    its data loader, is a reader with a share of the rows of each source, and takes no others.

    Args:
        sources: the sources with their weights, which are scaled to a sum of one.
        seed: seed of the order.
        prepare: a function that makes a training row from a row and a name for its reading.

    Raises:
        ValueError: for weights that are not positive and finite.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source | StreamedSource, float]],
        seed: int = 0,
        prepare: Callable[[dict, str], dict] | None = None,
    ):
        check_weights({source.name: weight for source, weight in sources})
        self.sources, self.weights = [source for source, _ in sources], [weight for _, weight in sources]
        self.seed, self.prepare = seed, prepare
        self.share, self.shares = 0, 1

    @property
    def settings(self) -> dict[str, Any]:
        """The settings on which the rows depend, besides the number of workers."""
        sources = {source.name: [source.size, weight] for source, weight in zip(self.sources, self.weights)}
        return {"mixture": sources, "seed": self.seed, "shares": self.shares}

    def take_share(self, share: int, shares: int, workers: int):
        """Read only share number `share` of `shares`, divided among `workers` workers.

        Raises:
            ValueError: if a source has too few rows for all of them.
        """
        self.share, self.shares = share, shares
        for source in self.sources:
            source.check_shares(shares * max(workers, 1))

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share, shares = self.share * workers + number, self.shares * workers
        for source in self.sources:
            source.check_shares(shares)
        chance = random.Random(f"{self.seed} {share} {shares}")
        streams = [source.stream(share, shares, self.seed) for source in self.sources]
        while True:
            name, row = next(chance.choices(streams, self.weights)[0])
            yield row if self.prepare is None else self.prepare(row, name)


def check_weights(weights: Mapping[str, float]):
    """Raises `ValueError` for weights of sources that are not positive and finite."""
    check_types({"mixture": weights}, {"mixture": dict[str, float]}, "sources")
    if not weights or not all(weight > 0 and is_finite_number(weight) for weight in weights.values()):
        raise ValueError(f"A mixture needs sources with weights above 0, got {short_repr(dict(weights))}.")


def open_source(name: str, folder: Path, columns: Columns, streaming: bool = False) -> Source | StreamedSource:
    """A source of a mixture: as in `open_rows`, relative to `folder`, or an address of Parquet files that fsspec knows.

    Parquet files are read without a copy, and with `streaming` other tables too.

    Raises:
        ValueError: for an invalid source.
    """
    place = name if "://" in name else str(folder / name) if (folder / name).exists() else name
    files = parquet_files(place)
    if not files:
        if "://" in place:
            raise ValueError(f"{place} holds no Parquet files.")
        rows, root = open_rows(place, columns, streaming)
        return (Source if hasattr(rows, "__len__") else StreamedSource)(name, rows, root)
    rows = ParquetRows(files)
    root = Path(".") if "://" in place else Path(place) if Path(place).is_dir() else Path(place).parent
    if "messages" in rows.names and not columns.are_named:
        return Source(name, rows, root)
    return Source(name, ConversationRows(rows, columns.found_among(rows.names)), root)
