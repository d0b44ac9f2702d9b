"""Validation of the outputs of reward functions."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from functools import partial


# With larger rewards, their squares overflow float32 in a group's standard deviation, and nothing would be learned.
LARGEST_REWARD = 1e15


def check_rewards(name: str, rewards: Iterable[float | None], count: int) -> list[float | None]:
    """The outputs of a reward function for `count` images as numbers; `None` means that an image is not scored.

    Args:
        rewards: a list, a tensor or an array: for each image in order a number, or a tensor or an array of one number.

    Raises:
        ValueError: for another kind of output, such as a dict, another number of rewards, and a reward that is no
            number, not finite, or beyond 1e15.
    """
    try:
        if isinstance(rewards, str | bytes | Set) or hasattr(rewards, "keys"):
            raise TypeError("it is not ordered by images")
        rewards = list(rewards)
    except TypeError as error:
        raise ValueError(
            f"The reward {name!r} must return a list with one number for each image, or None for an image that it "
            f"does not score; got {type(rewards).__name__}: {error}."
        ) from error
    if len(rewards) != count:
        raise ValueError(f"The reward {name!r} returned {len(rewards)} rewards for {count} images; return one each.")
    return [_check_reward(name, index, reward) for index, reward in enumerate(rewards)]


def _check_reward(name: str, index: int, reward) -> float | None:
    try:
        # The only element of a tensor or an array.
        value = reward.item() if hasattr(reward, "item") else reward
        if isinstance(value, str | bytes):
            raise TypeError("a text is not a number")
        value = None if value is None else float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The reward {name!r} is a {type(reward).__name__} for image {index}: {error}; return a number, or None."
        ) from error
    if value is not None and not math.isfinite(value):
        raise ValueError(
            f"The reward {name!r} is {value} for image {index}; return finite numbers, or None for an image that "
            "cannot be scored."
        )
    if value is not None and abs(value) > LARGEST_REWARD:
        raise ValueError(
            f"The reward {name!r} is {value:.3g} for image {index}; rewards lie within ±{LARGEST_REWARD:.0e}, scale "
            "it down."
        )
    return value


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """What a reward raises names it; errors of the system, of memory and of timeouts stay what they are."""
    try:
        yield
    except (ImportError, MemoryError, OSError, RuntimeError, TimeoutError):
        raise
    except Exception as error:
        raise ValueError(f"The reward {name!r} raised {type(error).__name__}: {error}") from error


def validated_reward(function: Callable, timeout: float | None = None) -> Callable:
    """A reward function, sync or async, whose outputs are validated by `check_rewards`; it keeps its name.

    Args:
        timeout: seconds after which an async function that has not returned raises a `ValueError`.

    Raises:
        ValueError: for anything but a function, such as a model or its name.
    """
    if not callable(function) or hasattr(function, "parameters"):
        raise ValueError(
            "A reward of images is a function reward(prompts, completions, **columns), got "
            f"{type(function).__name__}; see transformers_nextflow.trainers.rl.rewards for functions around models."
        )
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)

    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__):

        async def reward(*, completions, **kwargs):
            try:
                with _errors_named(name):
                    rewards = await asyncio.wait_for(function(completions=completions, **kwargs), timeout)
            except TimeoutError as error:
                raise ValueError(
                    f"The reward {name!r} did not answer within reward_timeout={timeout} seconds; set another, or look "
                    "why it waits."
                ) from error
            return check_rewards(name, rewards, len(completions))

    else:

        def reward(*, completions, **kwargs):
            with _errors_named(name):
                rewards = function(completions=completions, **kwargs)
            return check_rewards(name, rewards, len(completions))

    reward.__name__ = name
    return reward
