"""Rules that hold for the project as a whole."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
CORE = """
from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration, NextFlowProcessor, NextFlowVQModel
from transformers_nextflow import generation_nextflow, modeling_nextflow
from transformers_nextflow.sequence import loss as loss_nextflow
"""
SCHEDULES = """
import importlib.util, pathlib
folder = importlib.util.find_spec("transformers_nextflow").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("scale_schedule", pathlib.Path(folder) / "scale_schedule.py")
sys.modules["scale_schedule"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["scale_schedule"])
"""


def modules_after(code: str) -> set[str]:
    """Names of all modules that are loaded after `code` has run in a fresh process."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_core_imports_no_extras():
    assert not modules_after(CORE) & {"diffusers", "trl", "peft", "datasets", "matplotlib", "imageio"}


def test_the_schedules_import_nothing_of_the_package_nor_of_transformers():
    assert not {name for name in modules_after(SCHEDULES) if name.startswith("transformers")}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    "prompt", ["a red circle", 'it\'s "quoted"', "$HOME $(shell echo 1) `id`; # $$", "--help", "ü 😀"]
)
def test_any_prompt_reaches_the_demo_unchanged(prompt, tmp_path):
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "transformers-nextflow"
    command.write_text('#!/bin/sh\nfor argument; do :; done\nprintf %s "$argument" > "$0.prompt"\n')
    command.chmod(0o755)
    for installed in (tmp_path / "bin" / "pip", tmp_path / ".installed-pipelines"):
        installed.touch()
    subprocess.run(["make", "demo", f"VENV={tmp_path}", f"PROMPT={prompt}"], cwd=ROOT, check=True, capture_output=True)
    assert Path(f"{command}.prompt").read_text() == prompt
