"""RL on the shapes world: its prompts, its settings, its summary, and the benchmark of what a step costs."""

import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("trl")
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("examples/shapes", "benchmarks")]
import rl  # noqa: E402
import rl_cost  # noqa: E402

from transformers_nextflow import ImageSampling  # noqa: E402
from transformers_nextflow.evaluation.shapes import CATEGORIES, is_reserved, parse_caption  # noqa: E402


def test_prompts_to_train_on_are_of_all_categories_and_not_kept_for_evaluation():
    rows = rl.training_prompts(60, seed=0)
    assert rows["category"] == [*CATEGORIES] * 10
    assert not any(map(is_reserved, rows["prompt"])) and all(map(parse_caption, rows["prompt"], [rl.WORLD] * 60))
    assert rl.training_prompts(60, seed=1)["prompt"] != rows["prompt"]


def test_trained_scales_are_drawn_with_chance_and_the_others_as_before():
    sampling = ImageSampling(guidance_scale=2.0, temperature=[0.7, 0.8, 0.0, 0.0])
    assert rl.exploring(sampling, 3, 4) == ImageSampling(guidance_scale=2.0, temperature=[0.7, 0.8, 0.7, 0.0])
    assert rl.exploring(ImageSampling(temperature=0.0), 1, 2).temperature == [1.0, 0.0]


def test_the_summary_tells_gains_of_drawing_and_losses_of_understanding():
    drawn = {category: 0.9 for category in CATEGORIES} | {"position": 0.3, "overall": 0.8}
    understood = {"questions": 0.7, "caption": 0.6, "located_caption": 0.5}
    before = {"text_to_image": drawn, "understanding": understood}
    after = {
        "text_to_image": drawn | {"position": 0.4, "overall": 0.85},
        "understanding": understood | {"questions": 0.69, "caption": 0.65},
    }
    found = rl.summary(before, after)
    assert found.pop("weakest_category") == "position"
    assert found == pytest.approx({"weakest_category_gain": 0.1, "overall_gain": 0.05, "understanding_drop": 0.01})


def test_a_step_on_the_prefix_reads_its_codes_alone_and_the_peak_is_seen():
    figures = rl_cost.measure("random", (1, 2, 3, 4), 2, "cpu", torch.float32, batch=2, repeats=1)
    assert figures["codes"] == 5 and figures["seconds"] > 0
    with rl_cost.PeakMemory("cpu") as memory:
        torch.ones(50_000_000).sum()
    assert memory.bytes >= 190_000_000
