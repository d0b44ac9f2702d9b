"""Scale schedules: the paper's table, sizes, levels, errors."""

import json
import math
from pathlib import Path

import pytest
import torch

from transformers_nextflow import ScaleSchedule, ScaleSchedules
from transformers_nextflow.scale_schedule import BASE_GRIDS


TABLE = json.loads((Path(__file__).parents[1] / "fixtures" / "scale_schedules.json").read_text())["rows"]
PAPER = ScaleSchedules(levels=((256, 12), (512, 16), (1024, 18)))
SMALL = ScaleSchedules(sides=(1, 1, 2, 3, 4, 6, 8), patch_size=8, levels=((32, 5), (64, 7)))


def test_schedules_equal_the_printed_table():
    assert len(TABLE) == 41
    built = [PAPER.build(tuple(row["scales"][11])) for row in TABLE]
    assert [[list(grid) for grid in schedule.grids] for schedule in built] == [row["scales"] for row in TABLE]


@pytest.mark.parametrize("level, num_scales, num_tokens", [(256, 12, 900), (512, 16, 3684), (1024, 18, 10084)])
def test_square_images_take_the_papers_numbers_of_tokens(level, num_scales, num_tokens):
    schedule = PAPER.build(level=level)
    assert (schedule.num_scales, schedule.num_tokens) == (num_scales, num_tokens)
    assert schedule.image_size(16) == (level, level)
    assert PAPER.for_size(level, level) == schedule


@pytest.mark.parametrize("schedules", [PAPER, SMALL], ids=["paper", "small"])
def test_every_listed_size_is_drawn_and_no_other(schedules):
    sizes = schedules.all_sizes()
    assert len(sizes) == len(set(sizes)) > 30
    for height, width in sizes:
        assert schedules.for_size(height, width).image_size(schedules.patch_size) == (height, width)
        assert max(height, width) <= 4 * min(height, width)
    height, width = sizes[0]
    with pytest.raises(ValueError, match=f"{width + 1} is not a multiple of {schedules.patch_size}; the nearest"):
        schedules.for_size(height, width + 1)


@pytest.mark.parametrize("level", [256, 512, 1024])
def test_nearest_schedule_has_the_nearest_ratio(level):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(200, 2000, (200, 2), generator=generator).tolist()
    sizes = [(h, w) for h, w in sizes if max(h, w) <= 4 * min(h, w)] + [(1, 4), (4000, 1000), (1, 1)]
    drawn = [row["scales"][{256: 11, 512: 15, 1024: 17}[level]] for row in TABLE]
    for height, width in sizes:
        grid = PAPER.nearest(height, width, level).final_grid
        gap = abs(math.log(grid[0] / grid[1] * width / height))
        assert gap == pytest.approx(min(abs(math.log(h / w * width / height)) for h, w in drawn))


def test_nearest_level_follows_the_area():
    assert PAPER.nearest(300, 300).image_size(16) == (256, 256)
    assert PAPER.nearest(600, 400).num_scales == 16
    assert PAPER.nearest(4000, 3000).num_scales == 18
    assert PAPER.nearest(*PAPER.build((12, 21), 512).image_size(16)) == PAPER.build((12, 21), 512)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: PAPER.for_size(256, 9 * 256), "256x2304 .* lies outside 1:4 to 4:1; the nearest is 1:4"),
        (lambda: PAPER.nearest(4001, 1000), "outside 1:4 to 4:1; the nearest is 4:1"),
        (lambda: PAPER.nearest(0, 16), "at least 1 pixel, got 0x16"),
        (lambda: PAPER.for_size(250, 256), "is not a multiple of 16; the nearest that is: 256x256"),
        (lambda: PAPER.for_size(320, 320), "320x320 is none of the sizes drawn; the nearest that is: 256x256"),
        (lambda: PAPER.nearest(1, 1, level=300), "Level 300 is none of .*; the nearest is 256"),
        (lambda: PAPER.build((16, 18)), "is none of the 41 aspect ratios"),
        (lambda: ScaleSchedules(sides=(2, 4)), "start at 1 and never shrink"),
        (lambda: ScaleSchedules(sides=(1, 4, 2)), "start at 1 and never shrink"),
        (lambda: ScaleSchedules(sides=()), "start at 1 and never shrink"),
        (lambda: ScaleSchedules(patch_size=0), "patch_size must be at least 1, got 0"),
        (lambda: ScaleSchedules(levels=((300, 12),)), "Level 300 with 12 scales does not fit"),
        (lambda: ScaleSchedules(levels=((256, 19),)), "Level 256 with 19 scales does not fit"),
        (lambda: ScaleSchedule(((2, 2),)), r"starts with the grid \(1, 1\)"),
        (lambda: ScaleSchedule(((1, 1), (3, 3), (2, 4))), "never shrink"),
        (lambda: PAPER.build(level=256).split(torch.zeros(6)), "6 codes do not fill whole scales"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_nearest_that_can(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_short_schedules_with_other_patches_keep_ratios_and_levels():
    assert SMALL.build().grids == ((1, 1), (1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8))
    assert SMALL.build(level=32).num_scales == 5
    assert SMALL.for_size(64, 64).final_grid == (8, 8)
    assert SMALL.for_size(32, 128).final_grid == (4, 16)
    for base_grid in BASE_GRIDS:
        height, width = SMALL.build(base_grid).final_grid
        assert (height > width) == (base_grid[0] > base_grid[1] and height != width)
        assert 0.75 * 64 <= height * width <= 1.3 * 64
    # The default is one level, the last side.
    assert ScaleSchedules(sides=(1, 2, 5), patch_size=4).resolutions == (20,)


@pytest.mark.parametrize("read_last_scale", [False, True])
def test_slots_offsets_and_splits_agree(read_last_scale):
    schedule = PAPER.build((12, 20), level=256)
    codes = torch.arange(2 * schedule.num_tokens).view(2, -1)
    parts = schedule.split(codes)
    assert [tuple(part.shape[1:]) for part in parts] == list(schedule.grids)
    assert torch.equal(torch.cat([part.flatten(1) for part in parts], 1), codes)
    assert [int(part[0, 0, 0]) for part in parts] == list(schedule.offsets[:-1])
    assert len(schedule.split(codes[:, : schedule.offsets[4]])) == 4
    last = 12 * 20 if read_last_scale else 0
    assert schedule.num_slots(read_last_scale) == schedule.num_tokens - 1 + last
    assert schedule.sequence_length(read_last_scale) == schedule.num_slots(read_last_scale) + 2
