"""What editors and type checkers know of the public names."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import transformers_nextflow


PACKAGES = ("transformers_nextflow", "transformers_nextflow.trainers", "transformers_nextflow.data")
USE = """
from typing import assert_type

import torch
from transformers_nextflow import (
    ImageGenerationOutput,
    NextFlowForConditionalGeneration,
    NextFlowPipeline,
    NextFlowPipelineOutput,
    ScaleSchedule,
    ScaleSchedules,
)
from transformers_nextflow.pipelines.conversations import NextFlowScores, NextFlowVideoOutput
from transformers_nextflow.trainers import NextFlowGRPOTrainer, NextFlowTrainer

pipe = NextFlowPipeline.from_pretrained("folder")
assert_type(pipe, NextFlowPipeline)
assert_type(pipe("a red circle", num_images_per_prompt=2), NextFlowPipelineOutput)
assert_type(pipe("a red circle").image_tokens, torch.LongTensor)
assert_type(pipe.video("a red circle", num_frames=2), NextFlowVideoOutput)
assert_type(pipe.score([], []), NextFlowScores)
assert_type(pipe.unwrapped_model, NextFlowForConditionalGeneration)
assert_type(pipe.unwrapped_model.generate_images(torch.LongTensor(), image_sizes=[(64, 64)]), ImageGenerationOutput)
assert_type(ScaleSchedules().for_size(256, 256), ScaleSchedule)
trainers: tuple[type, ...] = (NextFlowTrainer, NextFlowGRPOTrainer)
"""
WRONG = """\
pipe("a red circle", guidence_scale=2.0)
pipe("a red circle").imagse
ScaleSchedules().for_sise(1, 1)
"""


@pytest.mark.parametrize("name", PACKAGES)
def test_dir_lists_all_public_names_and_each_is_there(name):
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        assert getattr(package, public).__doc__, public


@pytest.mark.parametrize("name", PACKAGES[:2])
def test_all_public_names_come_by_a_star(name):
    names = {}
    exec(f"from {name} import *", names)
    assert set(importlib.import_module(name).__all__) <= names.keys()


def test_a_star_without_extras_brings_what_needs_none():
    hidden = (
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name in ('diffusers', 'trl') else find(name, *rest)\n"
        "from transformers_nextflow import *\nfrom transformers_nextflow.trainers import *\n"
        "assert 'NextFlowPipeline' not in globals() and 'NextFlowGRPOTrainer' not in globals()\n"
        "NextFlowConfig, NextFlowTrainer\n"
    )
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("pyrefly", path=Path(sys.executable).parent) is None, reason="needs pyrefly")
def test_a_type_checker_knows_what_calls_return(tmp_path):
    (tmp_path / "use.py").write_text(USE + WRONG)
    source = Path(transformers_nextflow.__file__).parents[1]
    settings = {
        "preset": "default", "project-includes": ["use.py"], "search-path": [str(source)],
        "python-interpreter-path": sys.executable,
    }  # fmt: skip
    (tmp_path / "pyrefly.toml").write_text(
        "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    )
    command = [Path(sys.executable).with_name("pyrefly"), "check", "--output-format", "min-text"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    lines = [line for line in done.stdout.splitlines() if "ERROR" in line]
    # What is wrong is found, so that the silence about the rest says something.
    assert len(lines) == len(WRONG.strip().splitlines()), done.stdout + done.stderr
    assert all(f"use.py:{len(USE.splitlines()) + 1 + number}:" in line for number, line in enumerate(lines)), (
        done.stdout
    )
