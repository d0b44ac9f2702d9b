"""Rotary resampling: against a loop over cells and complex numbers, as a projection, and what it keeps of an order."""

import cmath
import itertools
from fractions import Fraction

import pytest
import torch

from transformers_nextflow.vision_tokenizer.resampling import resample


# (fine, coarse): nested, not nested, not square, one side alone.
GRIDS = [((4, 4), (2, 2)), ((4, 4), (3, 3)), ((6, 5), (4, 3)), ((5, 3), (1, 1)), ((8, 2), (5, 2)), ((3, 7), (3, 4))]


def random_features(channels: int, grid: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, channels, *grid, generator=torch.Generator().manual_seed(0))


def place(cell: int, fine: int, coarse: int) -> tuple[int, Fraction]:
    """The coarse cell in which a fine cell's middle lies, and the way to it from the coarse cell's own middle."""
    middle = Fraction(2 * cell + 1, 2 * fine)
    parent = int(middle * coarse)
    return parent, middle - Fraction(2 * parent + 1, 2 * coarse)


def turn(pair: int, down: Fraction, right: Fraction) -> complex:
    """Pair 4 i + j turns i times over the height of the image and j times over its width; i starts anew after 3."""
    cycles = (pair // 4) % 4 * down + pair % 4 * right
    return cmath.exp(2j * cmath.pi * float(cycles))


def slow_resample(image: list, target: tuple[int, int], is_down: bool) -> torch.Tensor:
    """Features [channel][row][column] on another grid, one complex number after the other."""
    channels, source = len(image), (len(image[0]), len(image[0][0]))
    fine, coarse = (source, target) if is_down else (target, source)
    result = torch.zeros(channels, *target, dtype=torch.float64)
    children: dict[tuple[int, int], int] = {}
    for row in range(fine[0]):
        for column in range(fine[1]):
            (up, down), (left, right) = place(row, fine[0], coarse[0]), place(column, fine[1], coarse[1])
            children[up, left] = children.get((up, left), 0) + 1
            (y, x), (to_y, to_x) = ((row, column), (up, left)) if is_down else ((up, left), (row, column))
            for pair in range(channels // 2):
                value = complex(image[2 * pair][y][x], image[2 * pair + 1][y][x])
                rotation = turn(pair, down, right)
                value *= rotation if is_down else rotation.conjugate()
                result[2 * pair, to_y, to_x] += value.real
                result[2 * pair + 1, to_y, to_x] += value.imag
            if channels % 2:
                result[-1, to_y, to_x] += image[-1][y][x]
    if is_down:
        for (y, x), count in children.items():
            result[:, y, x] /= count
    return result.float()


@pytest.mark.parametrize("channels", [8, 37], ids=["even", "odd"])
@pytest.mark.parametrize("fine, coarse", GRIDS, ids=str)
def test_it_equals_the_loop_over_cells_both_ways(fine, coarse, channels):
    for source, target, is_down in ((fine, coarse, True), (coarse, fine, False)):
        features = random_features(channels, source)
        result = resample(features, target, "rotary")
        expected = torch.stack([slow_resample(image.tolist(), target, is_down) for image in features])
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fine, coarse", GRIDS, ids=str)
def test_what_went_down_comes_down_again_as_it_was(fine, coarse):
    features = random_features(9, fine)
    down = resample(features, coarse, "rotary")
    up = resample(down, fine, "rotary")
    assert down.shape == (2, 9, *coarse) and up.shape == features.shape
    torch.testing.assert_close(resample(up, coarse, "rotary"), down, atol=1e-5, rtol=0)
    assert not torch.allclose(up, features, atol=0.1)


def test_every_cell_of_every_grid_has_the_parent_that_its_middle_lies_in():
    # One channel is not rotated: going up it tells the parents alone.
    # Where a middle lies on the edge of two cells (as 33 cells' do in 22) rounding must not decide.
    for fine, coarse in [*itertools.combinations(range(16, 0, -1), 2), (33, 22), (63, 42)]:
        up = resample(torch.arange(float(coarse)).view(1, 1, 1, coarse), (1, fine), "rotary")
        assert up.flatten().tolist() == [place(cell, fine, coarse)[0] for cell in range(fine)], (fine, coarse)


def test_the_mean_of_four_cells_tells_their_order_and_the_plain_mean_does_not():
    features = random_features(32, (2, 2))
    moved = features.flip(-1)
    plain, plain_moved = (resample(x, (1, 1), "area") for x in (features, moved))
    torch.testing.assert_close(plain, plain_moved)
    assert (resample(features, (1, 1), "rotary") - resample(moved, (1, 1), "rotary")).abs().mean() > 0.1


@pytest.mark.parametrize("side", [2, 4])
def test_each_place_can_be_read_from_a_superposition(side):
    # 16 pairs of channels that all say the same: the frequencies are then orthogonal over 4 x 4 places.
    said = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(0))
    one_vector = resample(said.repeat(1, 16, 1, 1), (1, 1), "rotary")
    read = resample(one_vector, (side, side), "rotary").view(1, 16, 2, side, side).mean(1) * side**2
    torch.testing.assert_close(read, said, atol=1e-5, rtol=0)
