"""Finds spikes: steps whose gradient is far larger than those before."""

from __future__ import annotations

import statistics
from collections import deque


# How many norms have the median with which a step is compared, and the smallest number of them.
WINDOW, MIN_NORMS = 100, 10
SPIKE_RULES = ("count", "skip", "rewind")


class GradientSpikes:
    """The norms of the gradients of the last steps, by which spikes are found.

    Norms of spikes are kept too: if gradients have become larger for good, they count as normal after half a window.

    Args:
        factor: a spike has a norm of more than this many medians.
    """

    def __init__(self, factor: float):
        self.factor = factor
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, norm: float) -> bool:
        """Adds the norm of a step, and returns whether it is a spike compared with those before."""
        enough = len(self.norms) >= MIN_NORMS
        found = enough and norm > self.factor * statistics.median(self.norms)
        self.norms.append(norm)
        return found
