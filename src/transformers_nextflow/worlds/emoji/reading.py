"""How well a judge reads images whose scenes are known: true renders, or a tokenizer's reconstructions of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..score_tables import Score
from .cases import compare
from .judge import Judge
from .scene import Scene


def reading_scores(judge: Judge, images: Sequence[np.ndarray | Image.Image], scenes: Sequence[Scene]) -> Score:
    """Means of `compare` over images and what they show, and `layout`: grid and taken places are read right."""
    read = judge.read(images)
    scores = [compare(found, scene) for found, scene in zip(read, scenes)]
    means = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    layouts = [
        found.grid == scene.grid and [s.cell for s in found.stickers] == [s.cell for s in scene.stickers]
        for found, scene in zip(read, scenes)
    ]
    return means | {"layout": float(np.mean(layouts))}
