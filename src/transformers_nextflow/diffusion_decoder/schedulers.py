"""Schedulers of diffusers by their configs, and the times of their steps."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ..utils.short_repr import short_repr
from ..utils.typed_values import check_finite


# What a base predicts, by the `prediction_type` of its scheduler.
PREDICTIONS = {"epsilon": "noise", "v_prediction": "velocity"}


def make_scheduler(config: dict[str, Any] | None) -> FlowMatchEulerDiscreteScheduler | DDIMScheduler:
    """A scheduler with the noise of `config`; default: flow matching. Raises `ValueError` for one that is not usable.

    Only the noise is that of `config`. The steps are Euler's with flow matching and DDIM's otherwise: they add no
    noise, so that a seed fixes an image, and their noisy images have the variance of those in training.
    """
    if config is None:
        return FlowMatchEulerDiscreteScheduler()
    named = scheduler_class(config.get("_class_name")).from_config(dict(config))
    if is_flow_matching(type(named).__name__):
        kind, changes = FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": False}
    else:
        # Few steps must begin at the last time, where there is noise only; many schedulers leave it out by default.
        kind, changes = DDIMScheduler, {"timestep_spacing": "trailing"}
    # `from_config` would keep settings that only the named class has.
    given = {"clip_sample": False} | dict(named.config)
    own = {name: value for name, value in given.items() if name in inspect.signature(kind).parameters}
    return kind(**own | changes)


def predictions(config: dict[str, Any] | None) -> tuple[str, ...]:
    """What decoders with this scheduler can predict, its base's own prediction first. Raises `ValueError` for none."""
    scheduler = make_scheduler(config)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return "velocity", "image"
    kind = scheduler.config.prediction_type
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type {short_repr(kind)} is not supported; use {' or '.join(PREDICTIONS)}.")
    return (PREDICTIONS[kind],)


def scheduler_class(name: object) -> type:
    """A class of diffusers by its name. Raises `ValueError` unless it is a scheduler of flow matching or with betas."""
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(
            f"{short_repr(name)} is not a scheduler of diffusers; name one, as FlowMatchEulerDiscreteScheduler."
        )
    if not is_flow_matching(kind.__name__) and "beta_schedule" not in inspect.signature(kind).parameters:
        raise ValueError(f"{kind.__name__} is not supported; use a scheduler of flow matching, or one with betas.")
    return kind


def set_steps(scheduler, count: int, cells: int, device: torch.device | None = None):
    """Have a scheduler take so many steps for images or latents of so many cells."""
    if not is_flow_matching(type(scheduler).__name__):
        scheduler.set_timesteps(count, device=device)
        return
    options = {"sigmas": torch.linspace(1, 1 / count, count).tolist()}
    if scheduler.config.use_dynamic_shifting:
        options["mu"] = _shift_of_size(scheduler.config, cells // 4)
    scheduler.set_timesteps(device=device, **options)


def check_scheduler(config: dict[str, Any] | None, count: int):
    """Raises `ValueError` for a config of no scheduler, or of one that does not take `count` steps."""
    check_finite({"scheduler": config or {}})
    try:
        predictions(config)
        set_steps(make_scheduler(config), count, 1024)
    except Exception as error:  # schedulers take what comes, and fail at it
        raise ValueError(f"scheduler {short_repr(config)} cannot be used: {error}") from error


def is_flow_matching(name: str) -> bool:
    """Whether the class of a scheduler is one of flow matching, and not of noise with betas."""
    return name.startswith("FlowMatch")


def _shift_of_size(config, tokens: int) -> float:
    """By how much schedulers with a dynamic shift move an image of so many tokens: linear between their two ends."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)
