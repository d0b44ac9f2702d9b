"""The walk of a prompt: a call enters the files that docs/architecture.md draws, and goes one way."""

import re
import sys
from itertools import groupby, pairwise
from pathlib import Path

import torch
from tiny import tiny_model, tiny_processor

import transformers_nextflow
from transformers_nextflow import NextFlowPipeline


PACKAGE = f"{Path(transformers_nextflow.__file__).parent}/"
PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
# More than these, and nobody follows a prompt any more.
MOST_FILES = 10


def drawn_files() -> tuple[set[str], set[str]]:
    """The files of the walk, and those that are asked on the way."""
    section = PAGE.read_text().split("## From a prompt to pixels")[1]
    walk, asked = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    return {line.split()[0].partition(".")[0] for line in walk.splitlines()}, set(asked.split())


def file_of(frame) -> str | None:
    """The file of a frame without its ending; `None` outside of the package, and for its helpers."""
    inside = frame.f_code.co_filename.removeprefix(PACKAGE)
    is_other = inside == frame.f_code.co_filename or inside.startswith("utils/")
    return None if is_other else inside.removesuffix(".py")


def paths_of(call) -> set[tuple[str, ...]]:
    """For all functions that run during a call, the files through which it has come there, in order."""
    paths = set()

    def note(frame, event: str, _):
        if event == "call" and file_of(frame) is not None:
            files = []
            while frame is not None:
                files.append(file_of(frame))
                frame = frame.f_back
            paths.add(tuple(file for file, _ in groupby(file for file in files[::-1] if file is not None)))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return paths


def test_a_prompt_passes_the_drawn_files_and_returns_to_none():
    walk, asked = drawn_files()
    pipe = NextFlowPipeline(tiny_model(), tiny_processor())
    paths = paths_of(lambda: pipe("a red circle", guidance_scale=2.0, generator=torch.Generator().manual_seed(0)))
    assert {file for path in paths for file in path} == walk | asked
    assert len(walk) <= MOST_FILES
    assert not [path for path in paths if len(set(path)) < len(path)]
    assert not {pair for path in paths for pair in pairwise(path) if pair[0] in asked and pair[1] in walk}
