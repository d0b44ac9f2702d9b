"""Test whether the checker's score rises in RL whose only reward is the model's own reading.

    OMP_NUM_THREADS=1 python benchmarks/rl_self_reward.py --seeds 3 --minutes 20

The shapes checkpoint draws, and a frozen copy of it answers questions about the images. The reward is the probability
that the copy gives to the answers that the prompt implies. The checker scores prompts that are kept for evaluation, and
its verdict is not used in training. Runs are organised as in `rl_prefix.py`. Writes `results/rl_self_reward.json`: as
means over the seeds, `overall_gain` and `weakest_category_gain` by the checker, `understanding_drop`, and
`reading_gain`, how far the reward itself rose. `checker_rises` says whether the overall score rose with every seed. The
curves are drawn to `docs/rl/rl_self_reward.png`.
"""

from __future__ import annotations

import numpy as np
from rl_runs import benchmark_parser, draw_curves, gains, job, mean_curve, run_all, scores_before

from transformers_nextflow.evaluation.results import write_result


def reward_gain(log: list[dict], share: float = 0.2) -> float:
    """Returns how far the mean reward rose from the first to the last `share` of the logged steps."""
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    count = max(1, round(share * len(rewards)))
    return float(np.mean(rewards[-count:]) - np.mean(rewards[:count]))


def main():
    parser = benchmark_parser(__doc__, "rl_self_reward")
    parser.add_argument("--prefix", type=int, default=5, help="how many of the first scales are trained")
    arguments = parser.parse_args()
    before = scores_before(arguments)
    seeds = range(arguments.seeds)
    jobs = [job(arguments, f"seed_{seed}", reward="reading", seed=seed) for seed in seeds]
    runs = run_all(jobs, before, arguments.processes)
    values = gains(before, runs)
    scores = ["overall", values["weakest_category"]]
    values |= {
        "reading_gain": float(np.mean([reward_gain(run["log"]) for run in runs])),
        "checker_rises": all(run["overall_gain"] > 0 for run in runs),
        "curves": {along: mean_curve(runs, along, scores) for along in ("step", "seconds")},
        "before": before,
        "minutes": arguments.minutes,
        "processes": arguments.processes,
    }
    for name in ("reading_gain", "overall_gain", "weakest_category_gain", "understanding_drop", "checker_rises"):
        print(f"{name:<24} {values[name]}")
    print("drawn:", draw_curves({"own reading": runs}, scores, arguments.figures / "rl_self_reward.png"))
    print("written:", write_result(arguments.results / "rl_self_reward.json", values))


if __name__ == "__main__":
    main()
