"""Compare GRPO on the first scales with GRPO on all scales, on the shapes checkpoint (the paper's figure 12).

    OMP_NUM_THREADS=1 python benchmarks/rl_prefix.py --seeds 3 --minutes 20

Each arm trains a number of first scales from the same checkpoint. All arms train with the same seeds and for the same
number of minutes; `--compared_minutes` gives the arms that are compared with the first one another number. Runs go side
by side. Finished runs are kept in `--output_dir`, so the benchmark continues after it was killed. The scores are those
of prompts that are kept for evaluation, and of questions about sampled scenes. A step of fewer scales is faster, so the
curves are compared by step and by training time.
Writes `results/rl_prefix.json`: for the first of `--prefixes` the means over the seeds, `weakest_category_gain`,
`overall_gain` and `understanding_drop`, and for every arm the same with those of each seed and the curves.
`at_equal_steps` holds the scores on the prompts of the curves at the last step that all runs reached, and
`at_equal_seconds` those at the last second that all reached. The curves are drawn to `docs/rl/rl_prefix.png`.
"""

from __future__ import annotations

import numpy as np
from rl_runs import benchmark_parser, curve_at, draw_curves, gains, job, last_common, mean_curve, run_all, scores_before

from transformers_nextflow import NextFlowConfig
from transformers_nextflow.evaluation.results import write_result


def label(num_prefix_scales: int, num_scales: int) -> str:
    return "all scales" if num_prefix_scales == num_scales else f"first {num_prefix_scales} scales"


def at_equal(arms: dict[str, list[dict]], along: str, names: list[str]) -> dict:
    """Returns the mean scores of every arm at the last point that all runs reached."""
    place = last_common([run for runs in arms.values() for run in runs], along)
    scores = {
        arm: {name: float(np.mean([curve_at(run, along, name, [place]) for run in runs])) for name in names}
        for arm, runs in arms.items()
    }
    return {along: place} | scores


def main():
    parser = benchmark_parser(__doc__, "rl_prefix")
    parser.add_argument(
        "--prefixes",
        type=int,
        nargs="+",
        default=[5, 2, 8],
        help="numbers of first scales to train, that of the main arm first",
    )
    parser.add_argument("--compared_minutes", type=float, help="minutes of the other arms; default: as many")
    arguments = parser.parse_args()
    compared_minutes = arguments.compared_minutes or arguments.minutes
    minutes = dict.fromkeys(arguments.prefixes, compared_minutes) | {arguments.prefixes[0]: arguments.minutes}
    num_scales = len(NextFlowConfig.from_pretrained(arguments.checkpoint).vq_config.scales)
    before = scores_before(arguments)
    runs = [
        job(
            arguments,
            f"prefix_{prefix}-seed_{seed}",
            reward="checker",
            prefix=prefix,
            seed=seed,
            minutes=minutes[prefix],
        )
        for seed in range(arguments.seeds)
        for prefix in arguments.prefixes
    ]
    done = run_all(runs, before, arguments.processes)
    arms = {
        label(prefix, num_scales): [values for values in done if values["settings"]["prefix"] == prefix]
        for prefix in arguments.prefixes
    }
    found = {arm: gains(before, own) for arm, own in arms.items()}
    main_arm = found[label(arguments.prefixes[0], num_scales)]
    scores = ["overall", main_arm["weakest_category"]]
    for arm, own in found.items():
        own["curves"] = {along: mean_curve(arms[arm], along, scores) for along in ("step", "seconds")}
        steps = [run["steps"] for run in own["seeds"]]
        gained = ("overall_gain", "weakest_category_gain", "understanding_drop")
        print(f"{arm:<16}", *(f"{name} {own[name]:+.4f}" for name in gained), "steps", steps)
    values = {name: main_arm[name] for name in ("weakest_category", "weakest_category_gain", "overall_gain")}
    values |= {"understanding_drop": main_arm["understanding_drop"], "num_prefix_scales": arguments.prefixes[0]}
    values |= {
        f"at_equal_{unit}": at_equal(arms, along, scores) for unit, along in (("steps", "step"), ("seconds",) * 2)
    }
    values |= {"arms": found, "before": before, "processes": arguments.processes}
    values |= {"minutes": arguments.minutes, "compared_minutes": compared_minutes}
    print("drawn:", draw_curves(arms, scores, arguments.figures / "rl_prefix.png"))
    print("written:", write_result(arguments.results / "rl_prefix.json", values))


if __name__ == "__main__":
    main()
