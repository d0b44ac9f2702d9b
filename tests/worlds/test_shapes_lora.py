"""The new concept of `examples/shapes/lora.py`: its images, its captions, and what counts as right."""

import sys
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "shapes"))
import lora  # noqa: E402

from transformers_nextflow.worlds.shapes import Object, Scene, is_reserved, read, render  # noqa: E402


def test_a_house_is_right_if_it_is_as_asked_for_and_alone():
    scene = read(render(lora.house("red", 2, "black"), lora.WORLD), lora.WORLD)
    assert lora.is_house(scene, None, None) and lora.is_house(scene, "red", "black")
    assert not lora.is_house(scene, "blue", None) and not lora.is_house(scene, "red", "white")
    more = Scene((*scene.objects, Object("star", "blue", 0, 0)), "black")
    apart = Scene((Object("triangle", "red", 2, 1), Object("square", "red", 3, 2)), "black")
    assert not lora.is_house(more, "red", None) and not lora.is_house(apart, "red", None)


def test_no_part_of_a_house_is_a_pair_that_the_checkpoint_never_drew():
    parts = {(part, color) for part in (lora.ROOF, lora.WALL) for color in lora.COLORS}
    assert len(lora.COLORS) == 4 and not parts & set(lora.WORLD.held_out_pairs)


def test_what_is_scored_is_never_trained_on():
    captions = [text for text, *_ in lora.evaluation_captions(100)]
    assert len(set(captions)) == 100 and all(map(is_reserved, captions))
    rng = np.random.default_rng(0)
    exchanges = [lora.house_exchange(rng) for _ in range(300)]
    assert not {exchange.asked[0] for exchange in exchanges} & set(captions)
    assert all(lora.is_house(exchange.answer[0], None, None) for exchange in exchanges)
