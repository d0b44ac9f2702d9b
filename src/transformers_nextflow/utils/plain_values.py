"""Turns arrays, tensors and Arrow's values into plain ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_list(value: Any) -> list | None:
    """Lists, tuples, arrays, tensors and Arrow's lists as a list of their entries; `None` for anything else."""
    value = plain(value)
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return list(value)
    return None


def plain(value: Any) -> Any:
    """Tensors become arrays and Arrow's lists become lists; other values are returned unchanged."""
    if isinstance(value, torch.Tensor):
        return (value.float() if value.is_floating_point() else value).detach().cpu().numpy()
    for convert in ("as_py", "to_pylist"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    return value
