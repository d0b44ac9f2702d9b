"""Compare this code with an earlier one on the same machine: seconds of training steps and drawings, and memory.

    OMP_NUM_THREADS=2 python benchmarks/before_and_after.py --before FOLDER

FOLDER is a checkout of the earlier code (38591ca is the last one before interpolation by matrices and attention without
masks). Each measurement runs in its own process; the two codes take turns, and the least seconds count, since other
processes can only add time. Training steps, without the optimizer, are those of a small convolutional tokenizer with
bicubic interpolation and of a transformer on codes of the same grids, eight images each; prompts are of unequal length.
Drawings are of one image and of four, with guidance. Memory is the peak in addition to the weights.
Writes `results/before_and_after.json`: measurement → `before`, `after` and their ratio, above 1 where this code is
faster or smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from backbone import RESULTS
from measured_steps import MEASUREMENTS
from tqdm import tqdm

from transformers_nextflow.evaluation.results import write_result


ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("measured_steps.py")


def measure(code: Path, name: str) -> dict[str, float]:
    """Returns the seconds, and the bytes where they are measured, of a measurement with the code in a folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(code / part) for part in ("src", "benchmarks"))}
    command = [sys.executable, "-P", SCRIPT, name]  # -P: it imports the measured code's `backbone`, not that beside it
    done = subprocess.run(command, env=environment, cwd=code, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the earlier code")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    codes, values = {"before": options.before.resolve(), "after": ROOT}, {}
    for name in tqdm(options.measurements, unit="measurement"):
        found = {code: [] for code in codes}
        for _ in range(options.turns):
            for code, folder in codes.items():
                found[code].append(measure(folder, name))
        for unit in found["after"][0]:
            least = {code: min(turn[unit] for turn in turns) for code, turns in found.items()}
            values[f"{name}, {unit}"] = least | {"ratio": round(least["before"] / least["after"], 3)}
            print(f"{name}, {unit}: {least['before']:.4g} before, {least['after']:.4g} after")
    print("written:", write_result(options.results / "before_and_after.json", values))


if __name__ == "__main__":
    main()
