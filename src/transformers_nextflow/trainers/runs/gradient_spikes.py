"""Steps whose gradient is far larger than those before: which they are."""

from __future__ import annotations

import statistics
from collections import deque


# Norms whose median a step is compared with, and how many of them there must be.
WINDOW, FEWEST = 100, 10
SPIKE_RULES = ("count", "skip", "rewind")


class GradientSpikes:
    """The norms of the gradients of the last steps, and which steps are spikes beside them.

    Norms of spikes are kept too: where gradients have become larger for good, they are the measure after half a window.

    Args:
        factor: a spike has a norm of more than so many medians.
    """

    def __init__(self, factor: float):
        self.factor = factor
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, norm: float) -> bool:
        """Takes in the norm of a step, and says whether it is a spike beside those before."""
        enough = len(self.norms) >= FEWEST
        found = enough and norm > self.factor * statistics.median(self.norms)
        self.norms.append(norm)
        return found
