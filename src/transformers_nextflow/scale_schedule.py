"""Scale schedules: which grids of codes an image is drawn on, and where each grid lies in the sequence.

All code that handles an image in the sequence (processor, teacher forcing, sampling, losses) uses this file. It imports
nothing else of the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from numbers import Integral


Grid = tuple[int, int]

# Paper, appendix A.1, table 14. Every printed row is `round(n / 16 * base)` for the square sides n, so the side of the
# square list at which a base grid is reached is 16, whatever list a model uses.
SQUARE_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
BASE_SIDE = 16
BASE_GRIDS: tuple[Grid, ...] = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 26), (9, 27), (10, 25), (10, 24), (11, 23), (11, 22),
    (11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15),
    (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (21, 11), (22, 11), (23, 11), (24, 10),
    (25, 10), (26, 9), (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8),
)  # fmt: skip
MAX_ASPECT_RATIO = 4.0
MAX_CACHED = 64
_KEPT: dict[str, ScaleSchedules] = {}
# From each level on, the largest number of frames of a video (paper, section 5.4). Images below the 512 level have a
# quarter of its codes, so four times as many frames cost as much.
MAX_FRAMES_OF_LEVELS = ((1024, 3), (512, 5), (0, 20))


@dataclass(frozen=True)
class ScaleSchedule:
    """The grids (height, width) of one image, coarse to fine; the first is always (1, 1).

    `image_tokens` of an image are (N,) with N = `num_tokens`: the grids' codes one after the other, each row-major.

    In the sequence an image is `<boi>`, `num_slots` slots and `<eoi>` (paper, figure 5). `<boi>` predicts the one
    code of the first grid; the slots of grid k read the codes of grid k-1 and predict those of grid k. With
    `read_last_scale` one more grid of slots reads the codes of the last grid and predicts nothing.

    Attributes:
        tokens_per_scale: how many codes each grid has.
        offsets: where each grid starts in `image_tokens`; one entry more than there are grids.
    """

    grids: tuple[Grid, ...]
    tokens_per_scale: tuple[int, ...] = field(init=False, repr=False, compare=False)
    offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        grids = tuple((int(height), int(width)) for height, width in self.grids)
        counts = tuple(height * width for height, width in grids)
        offsets = tuple(accumulate(counts, initial=0))
        for name, value in (("grids", grids), ("tokens_per_scale", counts), ("offsets", offsets)):
            object.__setattr__(self, name, value)
        if not self.grids or self.grids[0] != (1, 1):
            raise ValueError(f"A scale schedule starts with the grid (1, 1), got {list(self.grids[:1])}.")
        for (h0, w0), (h1, w1) in zip(self.grids, self.grids[1:]):
            if h1 < h0 or w1 < w0:
                raise ValueError(f"The grids of a scale schedule never shrink, got {(h0, w0)} before {(h1, w1)}.")

    @property
    def num_scales(self) -> int:
        return len(self.grids)

    @property
    def final_grid(self) -> Grid:
        return self.grids[-1]

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens_per_scale)

    def slot_grids(self, read_last_scale: bool = False) -> tuple[Grid, ...]:
        """The grids of the slots between `<boi>` and `<eoi>`, in order."""
        return self.grids[1:] + ((self.final_grid,) if read_last_scale else ())

    def num_slots(self, read_last_scale: bool = False) -> int:
        return sum(height * width for height, width in self.slot_grids(read_last_scale))

    def num_positions(self, read_last_scale: bool = False) -> int:
        """How many positions an image takes in a sequence, `<boi>` and `<eoi>` included; all slots of a scale share
        one.
        """
        return self.num_scales + read_last_scale + 1

    def sequence_length(self, read_last_scale: bool = False) -> int:
        """How many tokens an image takes in a sequence, `<boi>` and `<eoi>` included."""
        return self.num_slots(read_last_scale) + 2

    def image_size(self, patch_size: int) -> tuple[int, int]:
        """Height and width in pixels, computed from the final grid and not taken from the paper's printed table."""
        height, width = self.final_grid
        return height * patch_size, width * patch_size

    def split(self, image_tokens):
        """Split (..., N) codes into one (..., h_k, w_k) tensor per scale; the codes of only the first scales work
        too.
        """
        length = image_tokens.shape[-1]
        if length not in self.offsets[1:]:
            raise ValueError(f"{length} codes do not fill whole scales of {self.grids}; allowed: {self.offsets[1:]}.")
        return [
            image_tokens[..., start:stop].unflatten(-1, grid)
            for start, stop, grid in zip(self.offsets, self.offsets[1:], self.grids)
            if stop <= length
        ]


@dataclass(frozen=True)
class ScaleSchedules:
    """All schedules of a model: a list of square sides, cut at levels, stretched to 41 aspect ratios.

    Args:
        sides: sides of the square grids, coarse to fine.
        patch_size: pixels per side of a cell of the last grid.
        levels: for each resolution in pixels (the side of the square image) the number of scales that draw it.
            Default: one level, all sides.
    """

    sides: tuple[int, ...] = SQUARE_SIDES
    patch_size: int = 16
    levels: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        sides, levels = _whole_numbers("scales", self.sides), self.levels
        object.__setattr__(self, "sides", sides)
        if not isinstance(levels, list | tuple) or not all(
            isinstance(level, list | tuple) and len(level) == 2 for level in levels
        ):
            raise ValueError(f"levels must be a list of [resolution, number of scales], got {levels!r}.")
        levels = tuple(_whole_numbers("levels", level) for level in levels)
        _whole_numbers("patch_size", [self.patch_size])
        if not self.sides or self.sides[0] != 1 or list(self.sides) != sorted(self.sides):
            raise ValueError(f"The sides of the square grids start at 1 and never shrink, got {list(self.sides)}.")
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}.")
        levels = tuple(sorted(levels or ((self.sides[-1] * self.patch_size, len(self.sides)),)))
        for resolution, count in levels:
            if not 1 <= count <= len(self.sides) or self.sides[count - 1] * self.patch_size != resolution:
                allowed = sorted({side * self.patch_size for side in self.sides})
                raise ValueError(
                    f"Level {resolution} with {count} scales does not fit the sides {list(self.sides)} of "
                    f"{self.patch_size}-pixel cells; these draw {allowed} pixels."
                )
        object.__setattr__(self, "levels", levels)

    @property
    def resolutions(self) -> tuple[int, ...]:
        return tuple(resolution for resolution, _ in self.levels)

    def build(self, base_grid: Grid = (BASE_SIDE, BASE_SIDE), level: int | None = None) -> ScaleSchedule:
        """The schedule of a base grid (height, width at side 16; see `BASE_GRIDS`) at a level (default: the highest).

        Raises:
            ValueError: if there is no such base grid or level.
        """
        if tuple(base_grid) not in BASE_GRIDS:
            raise ValueError(f"Base grid {tuple(base_grid)} is none of the {len(BASE_GRIDS)} aspect ratios.")
        return _schedule(self.sides[: self._num_scales(level)], tuple(base_grid))

    def for_size(self, height: int, width: int) -> ScaleSchedule:
        """The schedule that draws exactly `height` x `width` pixels.

        Raises:
            ValueError: if no schedule does; the message names the nearest size of a schedule.
        """
        self._check_aspect_ratio(height, width)
        schedule = self._by_size.get((height, width))
        if schedule is None:
            nearest = self.nearest(height, width).image_size(self.patch_size)
            divisible = height % self.patch_size == 0 and width % self.patch_size == 0
            reason = "is none of the sizes drawn" if divisible else f"is not a multiple of {self.patch_size}"
            raise ValueError(f"Size {height}x{width} {reason}; the nearest that is: {nearest[0]}x{nearest[1]}.")
        return schedule

    def nearest(self, height: int, width: int, level: int | None = None) -> ScaleSchedule:
        """The schedule whose aspect ratio is nearest to `height`:`width`, at a level (default: nearest in area).

        Raises:
            ValueError: for a ratio outside 1:4 to 4:1, or sides below 1.
        """
        self._check_aspect_ratio(height, width)
        if level is None:
            level = min(self.resolutions, key=lambda r: abs(math.log(height * width) - 2 * math.log(r)))
        ratio = math.log(height / width)
        schedules = (self.build(grid, level) for grid in BASE_GRIDS)
        return min(schedules, key=lambda s: abs(math.log(s.final_grid[0] / s.final_grid[1]) - ratio))

    def all_sizes(self) -> list[tuple[int, int]]:
        """Every (height, width) in pixels that can be drawn."""
        return sorted(self._by_size)

    @cached_property
    def _by_size(self) -> dict[tuple[int, int], ScaleSchedule]:
        # Base ratios that end on the same grid at a coarse level differ in earlier scales; the squarest of them is
        # used.
        order = sorted(BASE_GRIDS, key=lambda grid: abs(math.log(grid[0] / grid[1])), reverse=True)
        schedules = (self.build(grid, level) for level in self.resolutions for grid in order)
        return {schedule.image_size(self.patch_size): schedule for schedule in schedules}

    def _num_scales(self, level: int | None) -> int:
        counts = dict(self.levels)
        level = self.resolutions[-1] if level is None else level
        if level not in counts:
            nearest = min(counts, key=lambda resolution: abs(resolution - level))
            raise ValueError(f"Level {level} is none of {list(counts)}; the nearest is {nearest}.")
        return counts[level]

    def _check_aspect_ratio(self, height: int, width: int):
        if height < 1 or width < 1:
            raise ValueError(f"Height and width must be at least 1 pixel, got {height}x{width}.")
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            nearest = "1:4" if height < width else "4:1"
            raise ValueError(
                f"The aspect ratio of {height}x{width} (height:width) lies outside 1:4 to 4:1; "
                f"the nearest is {nearest}."
            )


def schedules_of(settings) -> ScaleSchedules:
    """The schedules of a config or an image processor, by its `scales`, `patch_size` and `levels`.

    Raises:
        ValueError: for values that are no whole numbers, or do not fit together.
    """
    scales, levels = settings.scales, settings.levels
    key = repr((scales, settings.patch_size, levels))
    # Cached by value, since every image needs its schedule, and a config may change.
    if key not in _KEPT:
        if len(_KEPT) >= MAX_CACHED:
            _KEPT.clear()
        _KEPT[key] = ScaleSchedules(scales, settings.patch_size, () if levels is None else levels)
    return _KEPT[key]


def _whole_numbers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if isinstance(values, list | tuple) and all(
        isinstance(value, Integral) and not isinstance(value, bool) for value in values
    ):
        return tuple(map(int, values))
    raise ValueError(f"{name} must hold whole numbers, got {values!r}.")


@lru_cache(maxsize=1024)
def _schedule(sides: Sequence[int], base_grid: Grid) -> ScaleSchedule:
    # The formula of all schedules; the printed table follows Python's rounding (half to even).
    def grid(side: int) -> Grid:
        return tuple(max(1, round(side / BASE_SIDE * length)) for length in base_grid)

    return ScaleSchedule(((1, 1),) + tuple(grid(side) for side in sides[1:]))


def max_frames_of_level(level: int) -> int:
    """How many frames of a video file a model reads or trains on at a level, the side of a square image in pixels."""
    return next(most for lowest, most in MAX_FRAMES_OF_LEVELS if level >= lowest)
