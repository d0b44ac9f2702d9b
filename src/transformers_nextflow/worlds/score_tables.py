"""Makes tables from the scores of cases."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


Score = dict[str, float]


def metric_table(results: Iterable[tuple[str, Score]]) -> dict[str, float]:
    """Means for each category and over the categories: `right` has the category's name, other scores a suffix to it."""
    by_metric: dict[str, dict[str, list[float]]] = {}
    for category, score in results:
        for metric, value in score.items():
            by_metric.setdefault(metric, {}).setdefault(category, []).append(value)
    if not by_metric:
        raise ValueError("There are no results to score.")
    table = {}
    for metric, by_category in by_metric.items():
        suffix = "" if metric == "right" else f"_{metric}"
        means = {category: float(np.mean(values)) for category, values in by_category.items()}
        table |= {f"{category}{suffix}": mean for category, mean in means.items()}
        table[f"overall{suffix}"] = float(np.mean(list(means.values())))
    return table
