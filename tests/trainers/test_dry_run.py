"""The dry run of all stages: what it changes of the recipes, and how it tells what moved."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from transformers_nextflow.trainers.recipes import RECIPES, load_recipe


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import dry_run  # noqa: E402


SIZES = sorted(path.stem for path in (RECIPES / "dry_run").glob("*.yaml"))


@pytest.mark.parametrize("size", SIZES)
def test_what_the_dry_run_changes_are_settings_of_the_recipes(size):
    values = yaml.safe_load((RECIPES / "dry_run" / f"{size}.yaml").read_text())
    stages = ["alignment", "pretrain_256", "pretrain_512", "pretrain_1024", "continued", "sft", "rl"]
    assert list(values["stages"]) == stages
    for stage in stages:
        recipe = load_recipe(stage, dry_run.changes_of(stage, values, steps=50))
        assert recipe.arguments["max_steps"] == 50 and recipe.arguments["save_steps"] == 25


def test_movements_are_told_by_part_as_shares_of_the_rate(tmp_path):
    names = {
        "model.visual_embedding.codes.weight": "visual_embedding",
        "lm_head.weight": "heads",
        "visual_head.weight": "heads",
        "model.language_model.embed_tokens.weight": "text_embedding",
        "model.language_model.layers.0.mlp.up_proj.weight": "backbone",
        "model.vq_model.quantizer.codebook": "vision_tokenizer",
    }
    assert set(names.values()) == set(dry_run.PARTS)
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "before.safetensors")
    after = {name: torch.tensor([0.0, 0.02]) if part == "heads" else torch.zeros(2) for name, part in names.items()}
    save_file(after, tmp_path / "after.safetensors")
    moved = dry_run.movements(tmp_path / "before.safetensors", tmp_path / "after.safetensors", rate=0.1)
    assert moved.pop("heads") == {"largest": 0.2, "mean": 0.1}
    assert all(part == {"largest": 0.0, "mean": 0.0} for part in moved.values())


def test_a_command_is_killed_when_its_file_is_there_and_its_failure_is_told(tmp_path):
    wait = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).mkdir(); time.sleep(60)"
    killed, memory = dry_run.run_until([sys.executable, "-c", wait, str(tmp_path / "there")], tmp_path / "there")
    assert killed and memory > 1
    assert not dry_run.run_until([sys.executable, "-c", "pass"], None)[0]
    with pytest.raises(RuntimeError, match="it broke"):
        dry_run.run_until([sys.executable, "-c", "raise SystemExit('it broke')"], None)
