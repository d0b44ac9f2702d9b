"""Settings of a server."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServingSettings:
    """Settings of a server; the limits are those of each replica.

    Args:
        model: folder of a model or a pipeline, or a repository of the Hub. All nodes of a cluster must reach it.
        name: the name of the model in requests; default: that of the folder.
        device, dtype: device and dtype of the model, as on the command line.
        max_batch_size: the largest number of images in one batch.
        batch_wait: seconds that an idle replica waits for more requests before it begins a batch.
        max_waiting: requests that are accepted and not yet answered; further ones get status 429.
        timeout: seconds from a request's acceptance to the end of its answer, and for the arrival of its body.
        max_upload: bytes of a request's body.

    Raises:
        ValueError: for a value out of range.
    """

    model: str
    name: str = ""
    device: str | None = None
    dtype: str = "auto"
    max_batch_size: int = 16
    batch_wait: float = 0.05
    max_waiting: int = 64
    timeout: float = 300.0
    max_upload: int = 32 * 2**20

    def __post_init__(self):
        for field in ("max_batch_size", "max_waiting", "max_upload"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"{field} must be a whole number from 1, got {value!r}.")
        for field in ("batch_wait", "timeout"):
            if not (math.isfinite(value := getattr(self, field)) and value >= 0):
                raise ValueError(f"{field} must be a number of seconds from 0, got {value!r}.")
        if not self.name:
            # The dataclass is frozen, so the name is set in this way.
            object.__setattr__(self, "name", Path(self.model).resolve().name)
