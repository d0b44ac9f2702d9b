"""Rules that hold for the project as a whole."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
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


def modules_after(*codes: str) -> list[set[str]]:
    """Names of all modules that are loaded after each piece of code, run one after another in a fresh process."""
    code = "import sys\n" + "".join(f"{code}\nprint(*sys.modules)\n" for code in codes)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_the_core_imports_no_extras_and_the_pipeline_no_table_of_all_pipelines_without_a_warning():
    core, pipeline = modules_after(CORE, "from transformers_nextflow import NextFlowPipeline")
    assert not core & {"diffusers", "trl", "peft", "datasets", "matplotlib", "imageio"}
    assert "diffusers" in pipeline and "diffusers.pipelines.auto_pipeline" not in pipeline


def test_the_schedules_import_nothing_of_the_package_nor_of_transformers():
    (loaded,) = modules_after(SCHEDULES)
    assert not {name for name in loaded if name.startswith("transformers")}


# Lowest first; a file imports from its own room and from those before it.
LAYERS = (
    ("utils", "scale_schedule"),
    ("configuration_nextflow", "evaluation", "tokenization_nextflow"),
    ("sequence", "vision_tokenizer"),
    ("image_processing_nextflow", "video_processing_nextflow", "modeling_nextflow_vq"),
    ("processing_nextflow",),
    ("generation",),
    ("generation_nextflow",),
    ("modeling_nextflow",),
    ("adapters", "diffusion_decoder", "onecat", "tokenflow_t2i"),
    ("pipelines",),
    ("pipeline_nextflow",),
    ("data",),
    ("conversion", "demo", "serving", "trainers"),
    ("worlds",),
    ("commands",),
    ("__init__", "cli"),
)


def rooms_that_import() -> dict[tuple[str, str], set[str]]:
    """Which files of a room import from which other room, all imports inside of functions included."""
    source, found = ROOT / "src" / "transformers_nextflow", {}
    for file in source.rglob("*.py"):
        inside = file.relative_to(source)
        room = inside.with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = inside.parts[: len(inside.parts) - node.level]
                target = [*above, *(node.module or "").split(".")] if node.module else list(above)
                for name in [target[0]] if target else [alias.name for alias in node.names]:
                    if name != room:
                        found.setdefault((room, name), set()).add(str(inside))
    return found


def test_imports_go_down_and_in_no_circle():
    height = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
    wrong = {pair: files for pair, files in rooms_that_import().items() if height[pair[0]] <= height[pair[1]]}
    assert not wrong


# One thing has one word. The texts on which the bundled checkpoint was trained keep theirs.
FORBIDDEN = re.compile(r"picture|\bfilms?\b|\bdrift|imageless", re.IGNORECASE)
TRAINED_TEXTS = re.compile(
    r"(caption|describe) the picture|in the picture\?|the last picture|does the picture show|"
    r"(in|of) (two|three|four|\{number\}) pictures|(simple )?picture of (?=[\"'a-z{])|framed picture"
)


def test_images_and_videos_have_one_word_each():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.splitlines() if name.endswith((".py", ".md", ".yaml", ".cfg", "Makefile"))]
    left_out = {"CHANGELOG.md", "tests/utils/test_project.py"}
    wrong = [
        f"{name}:{number}: {line.strip()}"
        for name in names
        if name not in left_out
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1)
        if FORBIDDEN.search(TRAINED_TEXTS.sub("", line))
    ]
    assert not wrong


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
