"""Rewards by their names, for recipes and the command line."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState

from ....modeling_nextflow import NextFlowForConditionalGeneration
from ....processing_nextflow import NextFlowProcessor
from ....utils.registry import Registry
from .reading import ask_for_caption, reading_reward


def own_reading(model: NextFlowForConditionalGeneration, processor: NextFlowProcessor) -> Callable:
    """The likelihood of the prompt as the caption of the image under the model as it is before the training."""
    # A trainer moves the policy to the device of its process, but no reward.
    frozen = copy.deepcopy(model).requires_grad_(False).to(PartialState().device)
    return reading_reward(frozen, processor, ask_for_caption(processor))


def shapes(model: NextFlowForConditionalGeneration, processor: NextFlowProcessor) -> Callable:
    """The exact checker of the shapes world."""
    return Registry("reward", {"shapes": "transformers_nextflow.worlds.shapes.rewards:shapes_reward"})["shapes"]


# Functions that make a reward from the model and its processor.
REWARDS = Registry(
    "reward",
    {name: f"{__name__}:{function.__name__}" for name, function in (("reading", own_reading), ("shapes", shapes))},
)


def find_reward(name: str, model: NextFlowForConditionalGeneration, processor: NextFlowProcessor) -> Callable:
    """A reward of `REWARDS`, or your own function as "file.py:function", whose file is run.

    Raises:
        ValueError: if there is neither, and for a file that cannot be run.
    """
    file, separator, function = name.rpartition(":")
    if not separator:
        return REWARDS[name](model, processor)
    if not Path(file).is_file():
        raise ValueError(
            f"There is no file {file} with a reward; give file.py:function, or one of {', '.join(REWARDS)}."
        )
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file; give file.py:function.")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    reward = getattr(module, function, None)
    if not callable(reward):
        raise ValueError(f"{file} has no function {function}.")
    return reward
