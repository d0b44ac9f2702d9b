"""Write `docs/ablations.md` from the ablations' texts and the results that there are.

python benchmarks/ablations/report.py
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from experiment import AS_IN_PAPER, CONTRARY, OPEN, RESULTS, ROOT, Ablation, in_words, mean_and_spread


# In the order of the page; each is a script beside this one, and its docstring is the text.
ABLATIONS = ("features", "correction", "scale_weights", "heads", "codebooks", "text_share")
INTRODUCTION = f"""\
# Ablations in miniature

The paper's ablations, each on the shapes world and within minutes on two cores. This page is written by
`python benchmarks/ablations/report.py` from the results; do not edit it.

The model is 96 wide with 4 layers; the images hold up to three objects of three shapes and three colours, 64 pixels
wide, in the codes of the bundled tokenizer where nothing else is said. All arms of an ablation have the same number of
steps of 32 samples and the same seeds, and are scored on the same held-out prompts and rows. So small a model, trained
so shortly, can agree with the paper or contradict it for reasons that do not carry over; below is what came out here.

- "Drawn right" is the share of held-out prompts (240 by default, as many of each of GenEval's six categories) whose
  image holds what is asked for by GenEval's rule; "drawn exactly" that of those with nothing else in the image.
  Codes are sampled at temperature 1 without guidance, so these are lower than a tuned sampler's.
- Losses are in nats, on held-out rows, and not weighted by scale.
- Figures are means over the seeds at the end of the training, ± their standard deviation. In the images lines are
  means, and bands the range over the seeds.
- A difference counts if it has one sign with every seed and its mean is more than two standard errors. A difference
  that the paper has and that does not count here is called {OPEN}, neither {AS_IN_PAPER} nor {CONTRARY}. Where the
  paper has two arms level, a difference that does not count is {AS_IN_PAPER}, and may still hide a small one.

A command that is cut off goes on where it was: finished jobs are kept in `runs/ablations`. They know their settings,
not the code; delete the folder after a change.
"""
PACKING = """\
## Packing

Paper (section 3.3, table 3): packing samples to a fixed compute budget gives 4.1 times the throughput of padding,
packing to a fixed length 3.4 times.

Here: no training, but the benchmark of the packing itself, `{command}`: useful tokens a second on a
mix of tasks at two levels, and the share of a step in which the faster of two workers waits for the slower one.

| packing | throughput over padding | wait |
|---|---|---|
"""


def page(results: Path) -> str:
    """The whole page from the results that lie in a folder."""
    parts = [INTRODUCTION]
    for name in ABLATIONS:
        module = importlib.import_module(name)
        path = results / f"ablation_{name}.json"
        parts.append(section(module.ABLATION, module.__doc__, json.loads(path.read_text()) if path.exists() else None))
    packing = results / "packing.json"
    return "\n".join(parts + ([packing_section(json.loads(packing.read_text()))] if packing.exists() else []))


def section(ablation: Ablation, text: str, result: dict | None) -> str:
    """An ablation's text, and its table, claims and image if it has been run."""
    title, _, body = text.strip().partition("\n")
    lines = [f"## {title}", body, ""]
    if result is None:
        lines += [f"Not run yet: `python benchmarks/ablations/{ablation.name}.py`.", ""]
        return "\n".join(lines)
    seeds = "one seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
    lines += [f"`{result['command']}`: {seeds}, {result['steps']} steps.", ""]
    lines += [f"| | {' | '.join(ablation.scores.values())} |", "|---" * (1 + len(ablation.scores)) + "|"]
    for arm, scores in result["summary"].items():
        lines.append(f"| {arm} | {' | '.join(in_words(scores[name]) for name in ablation.scores)} |")
    lines += ["", *(claim_line(ablation, claim) for claim in result["claims"]), ""]
    lines += [f"![Curves of the arms](ablations/{ablation.name}.png)", ""]
    return "\n".join(lines)


def claim_line(ablation: Ablation, claim: dict) -> str:
    """What the paper says of two arms, and what came out."""
    higher = sum(difference > 0 for difference in claim["differences"])
    difference = in_words(mean_and_spread(claim["differences"]))
    return (
        f"- {ablation.scores[claim['score']]}, {claim['first']} minus {claim['second']}: {difference}, positive with "
        f"{higher} of {len(claim['differences'])} seeds. The paper has it {claim['paper']}: **{claim['verdict']}**."
    )


def packing_section(result: dict) -> str:
    speed = {"padding": 1.0} | result["speedup_over_padding"]
    rows = [f"| {way} | {speed[way]:.2f} | {wait:.0%} |" for way, wait in result["wait"].items()]
    return PACKING.format(command=result["command"]) + "\n".join(rows) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "ablations.md")
    arguments = parser.parse_args()
    arguments.output.write_text(page(arguments.results))
    print("written:", arguments.output)


if __name__ == "__main__":
    main()
