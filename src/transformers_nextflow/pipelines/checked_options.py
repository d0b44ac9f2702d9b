"""Options of a [`NextFlowPipeline`] that are looked at before the work, and the scores of candidates after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..utils.known_names import check_function
from ..utils.short_repr import short_repr
from ..utils.typed_values import check_types, is_of_type


def dtype_of(component: str, dtype):
    """The part of a component, of the model or the diffusion decoder, in a `dtype` that names components."""
    for one in dtype.values() if isinstance(dtype, dict) else [dtype]:
        known = getattr(torch, one, None) if isinstance(one, str) else one
        if one not in (None, "auto") and not isinstance(known, torch.dtype):
            raise ValueError(f"dtype must be a type of torch, such as torch.bfloat16, got {short_repr(one)}.")
    if not isinstance(dtype, dict):
        return dtype
    if unknown := sorted(dtype.keys() - {"model", "processor", "diffusion_decoder", "default"}):
        raise ValueError(f"A dict of dtype names model, processor, diffusion_decoder or default, got {unknown[0]!r}.")
    return dtype.get(component, dtype.get("default", torch.float32))


def check_options(think: bool, max_thought_tokens: int, thought_temperature: float, flags: dict, **called):
    """Raises `ValueError` for functions that are none, for `flags` and for `think` that are neither true nor false, and
    for settings of a thought without one.
    """
    flags = flags | {"think": think}
    given = flags | {"max_thought_tokens": max_thought_tokens}
    check_types(given, dict.fromkeys(flags, bool) | {"max_thought_tokens": int}, "NextFlowPipeline")
    if max_thought_tokens < 0:
        raise ValueError(f"max_thought_tokens must be at least 0, got {max_thought_tokens}.")
    if not is_of_type(thought_temperature, float) or not 0 <= thought_temperature < float("inf"):
        raise ValueError(f"thought_temperature must be a number from 0, got {short_repr(thought_temperature)}.")
    if thought_temperature and not think:
        raise ValueError(
            f"thought_temperature={thought_temperature} is only for thoughts; add think, or leave it at 0."
        )
    for name, function in called.items():
        if function is not None:
            check_function(function, 4, name)


def checked_scores(scores: Sequence[float] | torch.Tensor, count: int) -> torch.Tensor:
    """Raises `ValueError` for anything but a finite number for each candidate."""
    try:
        checked = torch.as_tensor(scores, dtype=torch.float32).flatten()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"candidate_scorer must give a number for each candidate, got {short_repr(scores)}."
        ) from error
    if len(checked) != count or not bool(checked.isfinite().all()):
        raise ValueError(f"candidate_scorer must give {count} finite numbers, got {short_repr(scores)}.")
    return checked
