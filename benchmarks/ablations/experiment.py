"""An ablation as a command: it trains each arm with a few seeds, computes means and spreads, tests the claims of the
paper and plots the curves.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs import Budget, Cache, Job, Point, do_jobs
from matplotlib.figure import Figure

from transformers_nextflow.evaluation.results import write_result


ROOT = Path(__file__).parents[2]
RUNS, RESULTS, FIGURES = ROOT / "runs" / "ablations", ROOT / "benchmarks" / "results", ROOT / "docs" / "ablations"
AS_IN_PAPER, CONTRARY, OPEN = "as in the paper", "contrary to the paper", "undecided"

Curves = dict[str, dict[int, list[Point]]]


@dataclass(frozen=True)
class Claim:
    """A finding of the paper: in `score`, the arm `first` lies "above" or "below" `second`, or "level" with it."""

    score: str
    first: str
    second: str
    paper: str

    def test(self, arms: Curves) -> dict:
        """Returns the differences first - second of the final scores, one for each seed, and the verdict.

        A difference counts if it has one sign with every seed and its mean is more than two standard errors; all others
        are "level". If the paper claims a difference that comes out level, the claim is undecided. With a single seed
        every claim is undecided.
        """
        finals = [[curve[-1][self.score] for curve in arms[arm].values()] for arm in (self.first, self.second)]
        differences = [first - second for first, second in zip(*finals)]
        mean, spread = mean_and_spread(differences).values()
        found = "above" if min(differences) > 0 else "below" if max(differences) < 0 else "level"
        if spread is not None and abs(mean) <= 2 * spread / len(differences) ** 0.5:
            found = "level"
        verdict = AS_IN_PAPER if found == self.paper else OPEN if found == "level" else CONTRARY
        if spread is None:
            verdict = OPEN
        return asdict(self) | {"differences": differences, "found": found, "verdict": verdict}


@dataclass(frozen=True)
class Ablation:
    """Arms that differ in one thing, trained for equal steps from the same seeds.

    Args:
        name: the name of the script, of the result (`ablation_NAME.json`) and of the figure.
        arms: for the name of each arm, its settings for `run(seed, budget, cache, **settings)`; see [`Job`].
        scores: names of scores with their titles: the columns of the table, and the panels of the figure if the curves
            have these scores.
        claims: findings of the paper.
        steps: the default number of training steps.
    """

    name: str
    arms: dict[str, dict]
    run: Callable[..., list[Point]]
    scores: dict[str, str]
    claims: tuple[Claim, ...]
    steps: int = 400

    def main(self, description: str):
        """Runs the command."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument(
            "--steps", type=int, default=self.steps, help="training steps of 32 samples, the same for every arm"
        )
        parser.add_argument(
            "--prompts", type=int, default=40, help="prompts of each of the six categories that are drawn and scored"
        )
        parser.add_argument("--workers", type=int, default=2, help="number of processes, with one thread each")
        parser.add_argument("--runs", type=Path, default=RUNS, help="folder in which finished jobs are kept")
        parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
        parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figure")
        arguments = parser.parse_args()
        for name in ("seeds", "workers"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"--{name} starts at 1, got {getattr(arguments, name)}.")

        budget = Budget(arguments.steps, arguments.prompts)
        arms = self.train(range(arguments.seeds), budget, Cache(arguments.runs), arguments.workers)
        values = {"summary": summarize(arms), "claims": [claim.test(arms) for claim in self.claims]}
        values |= asdict(budget) | {"seeds": arguments.seeds, "settings": self.arms, "arms": arms}
        for arm, scores in values["summary"].items():
            print(f"{arm:<24}" + ", ".join(f"{name} {in_words(scores[name])}" for name in self.scores))
        path = write_result(arguments.results / f"ablation_{self.name}.json", values)
        print("written:", path, plot(arms, self.scores, arguments.figures / f"{self.name}.png"))

    def train(self, seeds: range, budget: Budget, cache: Cache, workers: int) -> Curves:
        """Returns the curve of every arm and seed."""
        # All arms of one seed come before the next seed, so an interrupted run has whole comparisons.
        jobs = {
            (arm, seed): Job(self.run, settings, seed, budget) for seed in seeds for arm, settings in self.arms.items()
        }
        do_jobs(jobs.values(), cache, workers)
        return {arm: {seed: jobs[arm, seed].curve(cache) for seed in seeds} for arm in self.arms}


def mean_and_spread(values: list[float]) -> dict[str, float | None]:
    """Returns the mean and the standard deviation over seeds, which is `None` for a single seed."""
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def summarize(arms: Curves) -> dict[str, dict[str, dict]]:
    """Returns mean and spread of every arm and score at the end of the training."""
    summary = {}
    for arm, curves in arms.items():
        finals = [curve[-1] for curve in curves.values()]
        summary[arm] = {name: mean_and_spread([final[name] for final in finals]) for name in finals[0]}
    return summary


def in_words(figure: dict[str, float | None]) -> str:
    """Formats a figure as in '0.412 ± 0.020'."""
    spread = "" if figure["spread"] is None else f" ± {figure['spread']:.3f}"
    return f"{figure['mean']:.3f}{spread}"


def plot(arms: Curves, scores: dict[str, str], path: Path) -> Path:
    """Plots a panel for each score that the curves have: the mean of every arm, and the range over its seeds."""
    points = next(iter(next(iter(arms.values())).values()))
    shown = {name: title for name, title in scores.items() if name in points[0]}
    figure = Figure(figsize=(4.2 * len(shown), 3.4), layout="constrained")
    for panel, (name, title) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items()):
        for arm, curves in arms.items():
            steps = [point["step"] for point in next(iter(curves.values()))]
            values = list(zip(*([point[name] for point in curve] for curve in curves.values())))
            low, mean, high = ([of(row) for row in values] for of in (min, statistics.mean, max))
            (line,) = panel.plot(steps, mean, marker=".", label=arm)
            panel.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path
