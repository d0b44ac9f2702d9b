"""Run trainings of `examples/shapes/rl.py` side by side, and summarise those of several seeds."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "shapes"))
import rl  # noqa: E402


# Number of points of a mean curve.
POINTS = 21


def benchmark_parser(description: str, name: str) -> argparse.ArgumentParser:
    """Returns a parser with the settings of `examples/shapes/rl.py` and those of a comparison over seeds."""
    parser = rl.training_parser(description)
    parser.set_defaults(minutes=20.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="number of runs side by side, which share the cores")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs") / name, help="folder in which finished runs are kept"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--figures", type=Path, default=Path(__file__).parents[1] / "docs" / "rl")
    return parser


def job(arguments: argparse.Namespace, name: str, **settings) -> argparse.Namespace:
    """Returns the arguments of one run, which is named `name` in the folder of the benchmark."""
    own = ("seeds", "prefixes", "compared_minutes", "processes", "results", "figures")
    shared = {key: value for key, value in vars(arguments).items() if key not in own}
    return argparse.Namespace(**shared | {"output_dir": str(arguments.output_dir / name)} | settings)


def scores_before(arguments: argparse.Namespace) -> dict:
    """Returns the scores before training, which are the same for all runs and computed once.

    Raises:
        ValueError: if the stored scores are those of another checkpoint or of other numbers of cases.
    """
    path, start = arguments.output_dir / "before.json", rl.start_of(arguments)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rl.scores_before(arguments), indent=2))
    before = json.loads(path.read_text())
    if not start.items() <= before.items():
        raise ValueError(f"{path} is of other weights or limits than {start}; remove the folder or choose another one.")
    return before


def finished(run: argparse.Namespace, before: dict) -> dict | None:
    """Returns what a run wrote when it was done, or `None` if it is not done yet.

    Raises:
        ValueError: if the run had other settings or started from other weights.
    """
    path = Path(run.output_dir) / "rl.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    if values["settings"] != vars(run) or values["before"] != before:
        raise ValueError(f"{path} is of other settings or weights; remove its folder, or choose another --output_dir.")
    return values


def run_all(runs: Sequence[argparse.Namespace], before: dict, processes: int) -> list[dict]:
    """Returns what every run wrote. Runs that are not finished are trained, each in a process with its share of the
    cores.

    A benchmark that was killed continues with the next run.
    """
    missing = [run for run in runs if finished(run, before) is None]
    if missing:
        threads = max(1, (os.cpu_count() or 1) // processes)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(threads,)) as pool:
            for run, _ in zip(missing, pool.map(rl.run, missing, [before] * len(missing))):
                print("finished:", run.output_dir, flush=True)
    return [finished(run, before) for run in runs]


def _begin(threads: int):
    torch.set_num_threads(threads)


def mean_scores(runs: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Returns the scores after training, the means over runs."""
    return {
        suite: {name: float(np.mean([run["after"][suite][name] for run in runs])) for name in scores}
        for suite, scores in runs[0]["after"].items()
    }


def gains(before: dict, runs: Sequence[dict]) -> dict:
    """Returns the gains of runs with several seeds: those of their mean scores, and those of each run."""
    names = ("weakest_category_gain", "overall_gain", "understanding_drop", "steps", "seconds")
    each = [{"seed": run["settings"]["seed"]} | {name: run[name] for name in names} for run in runs]
    return rl.summary(before, mean_scores(runs)) | {"seeds": each, "after": mean_scores(runs)}


def curve_at(run: dict, along: str, name: str, places: Sequence[float]) -> np.ndarray:
    """Returns the score `name` of a run at `places` along "step" or "seconds", by linear interpolation."""
    points = run["curve"]
    return np.interp(places, [point[along] for point in points], [point[name] for point in points])


def last_common(runs: Sequence[dict], along: str) -> float:
    """Returns the last step or second that all runs reached."""
    return min(run["curve"][-1][along] for run in runs)


def mean_curve(runs: Sequence[dict], along: str, names: Sequence[str]) -> dict[str, list[float]]:
    """Returns the mean scores over runs along "step" or "seconds", up to the last point that all runs reached."""
    places = np.linspace(0, last_common(runs, along), POINTS)
    curves = {name: np.mean([curve_at(run, along, name, places) for run in runs], 0) for name in names}
    return {key: np.round(values, 4).tolist() for key, values in ({along: places} | curves).items()}


def draw_curves(arms: dict[str, Sequence[dict]], names: Sequence[str], path: Path) -> Path:
    """Draws a figure with a row for each score, by step and by minute. Each arm has a thick line for its mean and a
    thin one for each run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False, sharey="row")
    for row, name in zip(panels, names):
        for panel, (along, unit, label) in zip(row, (("step", 1, "step"), ("seconds", 60, "minutes of training"))):
            for color, (arm, runs) in enumerate(arms.items()):
                for run in runs:
                    places = np.array([point[along] for point in run["curve"]])
                    panel.plot(places / unit, curve_at(run, along, name, places), f"C{color}", alpha=0.3, linewidth=0.8)
                mean = mean_curve(runs, along, [name])
                panel.plot(np.array(mean[along]) / unit, mean[name], f"C{color}", linewidth=2, label=arm)
            panel.set_xlabel(label)
            panel.grid(alpha=0.3)
        row[0].set_ylabel(f"held-out prompts right: {name.replace('_', ' ')}")
        row[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path
