"""Reward functions whose answers are looked at before they are believed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial


def check_rewards(name: str, rewards: Sequence[float | None], count: int) -> list[float | None]:
    """The answer of a reward function to `count` pictures as numbers; `None` leaves a picture out.

    Raises:
        ValueError: for an answer that is no sequence, holds another number of rewards, or one that is not finite.
    """
    try:
        rewards = [None if reward is None else float(reward) for reward in rewards]
    except TypeError as error:
        raise ValueError(
            f"The reward {name!r} must return a list with one number for each picture, or None for a picture that it "
            f"does not score; got {type(rewards).__name__}: {error}."
        ) from error
    if len(rewards) != count:
        raise ValueError(f"The reward {name!r} returned {len(rewards)} rewards for {count} pictures; return one each.")
    for index, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(
                f"The reward {name!r} is {reward} for picture {index}; return finite numbers, or None for a picture "
                "that cannot be scored."
            )
    return rewards


def checked(function: Callable) -> Callable:
    """A reward function, sync or async, whose answers go through `check_rewards`; it keeps its name.

    Raises:
        ValueError: for what is no function, such as a model or its name.
    """
    if not callable(function) or hasattr(function, "parameters"):
        raise ValueError(
            "A reward of pictures is a function reward(prompts, completions, **columns), got "
            f"{type(function).__name__}; see transformers_nextflow.trainers.rewards for functions around models."
        )
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)

    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__):

        async def reward(*, completions, **kwargs):
            return check_rewards(name, await function(completions=completions, **kwargs), len(completions))

    else:

        def reward(*, completions, **kwargs):
            return check_rewards(name, function(completions=completions, **kwargs), len(completions))

    reward.__name__ = name
    return reward
