"""OneCAT's scale schedules: a table for each aspect ratio, since no formula gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from ..scale_schedule import Grid, ScaleSchedule
from ..utils.short_repr import short_repr
from ..utils.typed_values import is_of_type


# Grids of the ratios height / width from 1 on, each with 13 scales; a ratio below 1 has those of its inverse, swapped.
TABLES: dict[float, tuple[Grid, ...]] = {
    float(ratio): tuple(tuple(map(int, grid.split(","))) for grid in grids.split())
    for ratio, grids in (
        line.split(maxsplit=1)
        for line in """
        1.0    1,1 2,2 4,4 6,6 8,8 12,12 16,16 20,20 24,24 32,32 40,40 48,48 64,64
        1.25   1,1 2,2 3,3 5,4 10,8 15,12 20,16 25,20 30,24 35,28 45,36 55,44 70,56
        1.333  1,1 2,2 4,3 8,6 12,9 16,12 20,15 24,18 28,21 36,27 48,36 60,45 72,54
        1.5    1,1 2,2 3,2 6,4 9,6 15,10 21,14 27,18 33,22 39,26 48,32 63,42 78,52
        1.75   1,1 2,2 3,3 7,4 11,6 14,8 21,12 28,16 35,20 42,24 56,32 70,40 84,48
        2.0    1,1 2,2 4,2 6,3 10,5 16,8 22,11 30,15 38,19 46,23 60,30 74,37 90,45
        2.5    1,1 2,2 5,2 10,4 15,6 20,8 25,10 30,12 40,16 50,20 65,26 80,32 100,40
        3.0    1,1 2,2 6,2 9,3 15,5 21,7 27,9 36,12 45,15 54,18 72,24 90,30 111,37
        """.strip().splitlines()
    )
}
# Ratios with their inverses after them; in a tie the first one wins.
INVERSES = {1.25: 0.8, 1.333: 0.75, 1.5: 0.666, 1.75: 0.571, 2.0: 0.5, 2.5: 0.4, 3.0: 0.333}
RATIOS = (1.0, *(ratio for pair in INVERSES.items() for ratio in pair))
MAX_SCALES = 13
# Sides of the square images of all levels, and their numbers of scales; the released scripts offer the second and the
# last level.
LEVELS = {256: 7, 512: 10, 768: 12, 1024: 13}


@dataclass(frozen=True)
class OneCatSchedules:
    """All schedules of a model, with the interface of NextFlow's [`ScaleSchedules`].

    Args:
        patch_size: pixels per side of a cell of the last grid.
        levels: for each resolution (the side of the square image in pixels) the number of scales that draw it.
    """

    patch_size: int = 16
    levels: tuple[tuple[int, int], ...] = ((512, 10), (1024, 13))

    def __post_init__(self):
        levels = tuple(sorted((int(resolution), int(count)) for resolution, count in self.levels))
        sides = [grid[0] for grid in TABLES[1.0]]
        for resolution, count in levels:
            if not 1 <= count <= MAX_SCALES or sides[count - 1] * self.patch_size != resolution:
                allowed = [[side * self.patch_size, number] for number, side in enumerate(sides, start=1)]
                raise ValueError(f"Level [{resolution}, {count}] is none of OneCAT's; these are {allowed}.")
        if not levels:
            raise ValueError("levels must hold at least one [resolution, number of scales].")
        object.__setattr__(self, "levels", levels)

    @property
    def resolutions(self) -> tuple[int, ...]:
        return tuple(resolution for resolution, _ in self.levels)

    def build(self, ratio: float = 1.0, level: int | None = None) -> ScaleSchedule:
        """The schedule of one of `RATIOS` (height / width) at a level (default: the highest).

        Raises:
            ValueError: if there is no such ratio or level.
        """
        if ratio not in RATIOS:
            raise ValueError(f"Ratio {ratio} is none of {list(RATIOS)}.")
        counts = dict(self.levels)
        level = self.resolutions[-1] if level is None else level
        if level not in counts:
            raise ValueError(f"Level {level} is none of {list(counts)}.")
        return _schedule(ratio, counts[level])

    def for_size(self, height: int, width: int) -> ScaleSchedule:
        """The schedule that draws exactly `height` x `width` pixels.

        Raises:
            ValueError: if no schedule does; the message names the nearest size of a schedule.
        """
        schedule = self._by_size.get((height, width))
        if schedule is None:
            nearest = self.nearest(height, width).image_size(self.patch_size)
            raise ValueError(
                f"Size {height}x{width} is none of the {len(self._by_size)} sizes drawn; the nearest that is: "
                f"{nearest[0]}x{nearest[1]}."
            )
        return schedule

    def nearest(self, height: int, width: int, level: int | None = None) -> ScaleSchedule:
        """The schedule whose ratio height / width is nearest, as a difference, at a level (default: nearest in area).

        Raises:
            ValueError: for sides below 1, and for an unknown level.
        """
        if height < 1 or width < 1:
            raise ValueError(f"Height and width must be at least 1 pixel, got {height}x{width}.")
        if level is None:
            level = min(self.resolutions, key=lambda r: abs(math.log(height * width) - 2 * math.log(r)))
        return self.build(min(RATIOS, key=lambda ratio: abs(ratio - height / width)), level)

    def all_sizes(self) -> list[tuple[int, int]]:
        """Every (height, width) in pixels that can be drawn."""
        return sorted(self._by_size)

    def level_of(self, schedule: ScaleSchedule) -> int:
        """The resolution at which a schedule is drawn."""
        return next(resolution for resolution, count in self.levels if count == schedule.num_scales)

    @cached_property
    def _by_size(self) -> dict[tuple[int, int], ScaleSchedule]:
        # At coarse levels two ratios may end on the same grid; the first one is used.
        schedules = [self.build(ratio, level) for level in self.resolutions for ratio in RATIOS]
        return {schedule.image_size(self.patch_size): schedule for schedule in reversed(schedules)}


@lru_cache
def schedules_of_levels(patch_size: int, levels: Sequence[tuple[int, int]]) -> OneCatSchedules:
    """[`OneCatSchedules`], cached, since every image needs its schedule."""
    return OneCatSchedules(patch_size, levels)


def checked_levels(levels: object) -> tuple[tuple[int, int], ...]:
    """Levels as tuples. Raises `ValueError` for anything but pairs of whole numbers."""
    if not is_of_type(levels, list[list[int]]) or not all(len(level) == 2 for level in levels):
        raise ValueError(f"levels are [resolution, number of scales], got {short_repr(levels)}.")
    return tuple((resolution, count) for resolution, count in levels)


@lru_cache
def _schedule(ratio: float, count: int) -> ScaleSchedule:
    if ratio in TABLES:
        return ScaleSchedule(TABLES[ratio][:count])
    own = next(wide for wide, inverse in INVERSES.items() if inverse == ratio)
    return ScaleSchedule(tuple((width, height) for height, width in TABLES[own][:count]))


def cell_positions(schedule: ScaleSchedule, scale: int) -> torch.Tensor:
    """Row and column (2, h*w) int64 of the cells of a scale, counted from 0, in the coordinates of the last grid."""

    # A product in float32, rounded half to even, as in the training; two entries of the tables depend on it.
    def side(count: int, final: int) -> torch.Tensor:
        return (torch.arange(count, dtype=torch.float32) * torch.tensor(final / count, dtype=torch.float32)).round()

    (height, width), (final_height, final_width) = schedule.grids[scale], schedule.final_grid
    rows, columns = side(height, final_height), side(width, final_width)
    return torch.cartesian_prod(rows, columns).T.reshape(2, -1).long()
