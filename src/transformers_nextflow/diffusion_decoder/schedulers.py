"""Schedulers of diffusers by their configs, and the times of their steps."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ..utils.short_repr import short_repr
from ..utils.typed_values import check_finite


def make_scheduler(config: dict[str, Any] | None):
    """A scheduler that nothing else steps; of no config one of flow matching. Raises `ValueError` for what is none."""
    if config is None:
        return FlowMatchEulerDiscreteScheduler()
    # Few steps must begin at the last time, where there is noise only; many schedulers leave it out by default.
    spacing = {"timestep_spacing": "trailing"} if "timestep_spacing" in config else {}
    return scheduler_class(config.get("_class_name")).from_config(dict(config), **spacing)


def scheduler_class(name: object) -> type:
    """A class of diffusers by its name. Raises `ValueError` for one that is no scheduler."""
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(
            f"{short_repr(name)} is not a scheduler of diffusers; name one, as FlowMatchEulerDiscreteScheduler."
        )
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
        set_steps(make_scheduler(config), count, 1024)
    except Exception as error:  # schedulers take what comes, and fail at it
        raise ValueError(f"scheduler {short_repr(config)} cannot be used: {error}") from error


def is_flow_matching(name: str) -> bool:
    """Whether the class of a scheduler is one of flow matching, and not of noise with alphas."""
    return name.startswith("FlowMatch")


def _shift_of_size(config, tokens: int) -> float:
    """By how much schedulers with a dynamic shift move an image of so many tokens: linear between their two ends."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)
