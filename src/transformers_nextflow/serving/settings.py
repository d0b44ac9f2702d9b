"""Settings of a server."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from ..sequence.chat_encoding import text_fault
from ..utils.short_repr import short_repr
from ..utils.typed_values import check_types, hints_of


# Of a name.
MAX_CHARACTERS = 200


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
        check_types({f.name: getattr(self, f.name) for f in fields(self)}, hints_of(ServingSettings), "ServingSettings")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be a number of seconds above 0, got {self.timeout!r}.")
        if not 0 <= self.batch_wait <= self.timeout:
            raise ValueError(f"batch_wait must be a number of seconds from 0 to timeout, got {self.batch_wait!r}.")
        if not self.model:
            raise ValueError("No model is named; name a folder, or a repository of the Hub.")
        if len(self.name) > MAX_CHARACTERS or not (self.name.isprintable() and text_fault(self.name) is None):
            raise ValueError(
                f"name must be of up to {MAX_CHARACTERS} characters that can be printed, got {short_repr(self.name)}."
            )
        if not self.name:
            # The dataclass is frozen, so the name is set in this way.
            object.__setattr__(self, "name", Path(self.model).resolve().name)
