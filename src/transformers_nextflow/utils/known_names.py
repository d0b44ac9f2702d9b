"""Unknown names, and suggestions of what was probably meant."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

from .short_repr import short_repr


P = ParamSpec("P")
R = TypeVar("R")

# Names of other libraries for our arguments, and what ours have in place of theirs.
NAMES_ELSEWHERE: dict[str, str] = {
    "seed": "generator",
    "random_seed": "generator",
    "num_inference_steps": "the number of scales, which follows from height and width",
    "steps": "the number of scales, which follows from height and width",
    "strength": "num_kept_scales, or mask_image",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "true_cfg_scale": "guidance_scale",
    "tokenizer": "processor",
    "image_processor": "processor",
    "torch_type": "torch_dtype",
    "images": "image",
    "input_image": "image",
    "init_image": "image",
    "mask": "mask_image",
    "prompts": "prompt",
    "size": "height and width",
    "num_images": "num_images_per_prompt",
    "n": "num_images_per_prompt",
    "batch_size": "num_images_per_prompt",
    "callback": "callback_on_step_end",
    "prompt_embeds": "prompt, which is read within the one sequence",
    "negative_prompt_embeds": "negative_prompt, which is read within the one sequence",
    "cross_attention_kwargs": "the weights that set_adapters takes",
    "joint_attention_kwargs": "the weights that set_adapters takes",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "scorer": "candidate_scorer",
    "frames": "num_frames",
    "lr": "learning_rate",
    "batch": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
}


def nearest_name(name: object, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, if there is one, or a description of the replacement."""
    known = list(known)
    stands_for = NAMES_ELSEWHERE.get(str(name))
    # What is no name itself begins with one, or is said of any call.
    if stands_for is not None and re.split("[ ,]", stands_for)[0] in (*known, "the"):
        return stands_for
    return next(iter(difflib.get_close_matches(str(name), known, n=1)), None)


def check_names(given: Iterable[object], known: Iterable[str], what: str):
    """Raises `ValueError` for a name that is not known, with the nearest one.

    Args:
        what: what has the names, such as "NextFlowPipeline.video".
    """
    known = list(known)
    for name in given:
        if name not in known:
            nearest = nearest_name(name, known)
            remedy = f"did you mean {nearest}?" if nearest else f"there are {', '.join(known)}."
            raise ValueError(f"{what} has no {str(name)[:80]!r}; {remedy}")


def check_function(function: object, count: int, name: str):
    """Raises `ValueError` for anything but a function that can be called with `count` arguments."""
    if not callable(function):
        raise ValueError(f"{name} must be a function, got {short_repr(function)}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # functions in C have no signature
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        raise ValueError(f"{name} is called with {count} arguments, but takes {signature}: {error}.") from error


def checks_names(function: Callable[P, R]) -> Callable[P, R]:
    """Wraps a function without `**kwargs` so that its error for an unknown keyword suggests what was probably meant."""
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    known = [name for name in parameters if name != "self"]

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        check_names(kwargs, known, function.__qualname__.removesuffix(".__call__"))
        return function(*args, **kwargs)

    return checked
