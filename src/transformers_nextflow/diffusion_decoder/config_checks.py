"""Configs of diffusion decoders, looked at before modules are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from torch import nn

from ..utils.short_repr import short_repr
from ..utils.typed_values import check_finite, check_types
from .schedulers import check_scheduler
from .settings import DiffusionSettings


# Of layers, and of channels and sides: more would rather fill the memory, or take for ever, than be meant.
MAX_LAYERS, MAX_CHANNELS = 1000, 2**16
FROM_ONE = (
    "condition_channels", "patch_size", "projected_channels", "projection_hidden_size", "pixel_cell", "lora_rank",
)  # fmt: skip


def check_config(config: Mapping[str, Any], init: Callable):
    """Raises `ValueError` for values of a diffusion decoder that are of another type than `init` annotates, or out of
    their range.
    """
    name = "NextFlowDiffusionDecoder"
    check_types(config, get_type_hints(init), name)
    check_finite({key: config[key] for key in ("base", "vae") if config[key] is not None})
    for key in FROM_ONE:
        if config[key] is not None and not 1 <= config[key] <= MAX_CHANNELS:
            raise ValueError(f"{name}: {key} must be from 1 to {MAX_CHANNELS}, got {config[key]}.")
    for part in ("base", "vae"):
        for key, value in (config[part] or {}).items():
            # Others may be 0, such as Flux's num_single_layers, or numbers of layers, as SD3's dual_attention_layers.
            least = 1 if key in ("num_layers", "layers_per_block") else 0
            for count in (value if isinstance(value, list | tuple) else [value]) if "layers" in key else ():
                if isinstance(count, int) and not least <= count <= MAX_LAYERS:
                    bounds = f"from {least} to {MAX_LAYERS}, got {short_repr(value)}."
                    raise ValueError(f"{name}: {part}.{key} must be {bounds}")
    sizes = config["trained_sizes"]
    if sizes is not None and not (sizes and all(len(size) == 2 and min(size) > 0 for size in sizes)):
        raise ValueError(f"{name}: trained_sizes are pairs of height and width in pixels, got {short_repr(sizes)}.")
    DiffusionSettings(config["num_inference_steps"], config["guidance_scale"])
    check_scheduler(config["scheduler"], config["num_inference_steps"])


def make_module(make: Callable[[dict], nn.Module], config: Mapping[str, Any], name: str) -> nn.Module:
    """A module of diffusers by its config. Raises `ValueError` that names the part for one that makes none."""
    try:
        return make(dict(config))
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # diffusers' modules take what comes, and fail at it
        raise ValueError(f"NextFlowDiffusionDecoder: its {name} cannot be created from its config: {error}") from error
