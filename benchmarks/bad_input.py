"""Count how bad inputs end: the cases of the tests by kind and outcome, with this code and with an earlier one.

    python benchmarks/bad_input.py --before FOLDER

FOLDER is a checkout of the earlier code. Without it only this code is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers_nextflow.evaluation.results import write_result


ROOT = Path(__file__).parents[1]
MODULES = (
    "files_and_images", "words_and_calls", "checkpoints_and_recipes", "settings_and_surroundings",
    "names_and_templates", "decoders_and_adapters", "trainings_and_servers",
)  # fmt: skip
# This script runs in its own process with the measured code on the path; its last line of output has the counts.
COUNT = """
import importlib, json, multiprocessing, pathlib, resource, sys, tempfile
import transformers_nextflow as package
# The name in the earlier code.
package.NextFlowImageProcessor = getattr(package, "NextFlowImageProcessor", None) or package.NextFlowImageProcessorPil
# A case that fills the memory fails in its own process.
resource.setrlimit(resource.RLIMIT_AS, (10 * 2**30, 10 * 2**30))
sys.path[:0] = {paths}
import bad_input
processes = multiprocessing.get_context("fork")

def act(case, place, results):
    results.send(bad_input.outcome(case, place))

def outcome_of(case, place):
    # Each case has its own process, so one that hangs outside of Python or ends the process stops nothing else.
    ours, theirs = processes.Pipe(False)
    process = processes.Process(target=act, args=(case, place, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(2 * bad_input.SECONDS) else (bad_input.HUNG, "")
    except EOFError:
        return bad_input.LOST, "the process ended"
    finally:
        process.kill()
        process.join()

counts, missed = {{}}, []
with tempfile.TemporaryDirectory() as folder:
    first = bad_input.Place(pathlib.Path(folder), bad_input.make_model(pathlib.Path(folder) / "model"))
    first.pipe, first.shapes  # loaded once for all cases
    for name in {modules}:
        try:
            cases = importlib.import_module(name).CASES
        except ImportError:  # cases of parts that the earlier code does not have
            continue
        for case in cases:
            place = bad_input.Place(pathlib.Path(tempfile.mkdtemp(dir=folder)), first.model, first.shared)
            outcome, told = outcome_of(case, place)
            kind = counts.setdefault(case.kind, {{"cases": 0, "as expected": 0}})
            kind["cases"] += 1
            kind["as expected"] += outcome == case.expected
            kind[outcome] = kind.get(outcome, 0) + 1
            if outcome != case.expected:
                missed.append([case.name, outcome, told[:200]])
print()
print(json.dumps([counts, missed]))
"""


def count(code: Path) -> tuple[dict[str, dict[str, int]], list]:
    """Returns kind → outcome → number of cases for the code in a checkout, and the cases with an unexpected outcome."""
    paths = [str(ROOT / "tests" / folder) for folder in ("bad_input", "diffusion_decoder", "")]
    environment = os.environ | {
        "PYTHONPATH": str(code / "src"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", COUNT.format(paths=paths, modules=MODULES)],
            env=environment, cwd=folder, capture_output=True, text=True, errors="replace",
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"The cases could not be run on {code}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of earlier code")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--show", action="store_true", help="print the cases with an unexpected outcome")
    arguments = parser.parse_args()
    values, columns = {}, {"after": ROOT} | ({"before": arguments.before.resolve()} if arguments.before else {})
    for column, code in columns.items():
        values[column], missed = count(code)
        for case in missed if arguments.show else ():
            print(column, *case, sep=" | ")
    for kind, own in values["after"].items():
        row = [f"{own['as expected']} of {own['cases']}"]
        if "before" in values:
            before = values["before"].get(kind)
            row.insert(0, f"{before['as expected']} of {before['cases']}" if before else "not there")
        print(f"{kind:<36} {' → '.join(row)}")
    for column, kinds in values.items():
        kinds["all"] = {name: sum(kind.get(name, 0) for kind in kinds.values()) for name in _names(kinds)}
        print(column, kinds["all"])
    print(write_result(arguments.results / "bad_input.json", values))


def _names(kinds: dict) -> list[str]:
    return sorted({name for kind in kinds.values() for name in kind})


if __name__ == "__main__":
    main()
