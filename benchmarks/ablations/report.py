"""Write `docs/ablations.md` from the docstrings of the ablations and their stored results.

python benchmarks/ablations/report.py
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from experiment import AS_IN_PAPER, CONTRARY, OPEN, RESULTS, ROOT, Ablation, in_words, mean_and_spread


# In the order of the page. Each name is a script in this folder whose docstring is the text of the section.
ABLATIONS = ("features", "emoji_features", "correction", "scale_weights", "heads", "codebooks", "text_share")
INTRODUCTION = f"""\
# Ablations in miniature

This page repeats the paper's ablations in miniature, within minutes on two cores: on the shapes world, and the first of
them on the emoji world too. It is written by `python benchmarks/ablations/report.py` from the stored results; do not
edit it.

**Setting.** The model has a width of 96 and 4 layers. Unless the text says otherwise, the images are 64 pixels wide and
hold up to three objects of three shapes and three colours, and their codes are those of the shapes tokenizer. An
ablation compares arms, which differ in one setting. All its arms train with the same seeds and for the same number of
steps of 32 samples, and are scored on the same held-out prompts and rows. So small a model, trained for so short a
time, can agree with the paper or contradict it for reasons that do not apply at full size. The page reports what came
out here.

**Scores.**

- "Drawn right" is the share of held-out prompts whose image holds what was asked for, by GenEval's rule. "Drawn
  exactly" is the share whose image holds nothing else either. By default there are 240 prompts, as many for each of
  GenEval's six categories. Codes are sampled at temperature 1 without guidance, so these scores are lower than those of
  a tuned sampler.
- Losses are in nats, measured on held-out rows, and not weighted by scale.
- Figures are means over the seeds at the end of the training, ± their standard deviation. In the plots, lines are means
  and bands are the range over the seeds.

**Verdicts.** A difference counts if it has the same sign with every seed and its mean is more than two standard errors.

- The verdict is "{AS_IN_PAPER}" or "{CONTRARY}" if a difference counts.
- It is "{OPEN}" if the paper finds a difference and the one here does not count.
- If the paper finds two arms level and the difference here does not count, the verdict is "{AS_IN_PAPER}"; a small
  difference may still be hidden.

**Repeating it.** An interrupted command continues where it was, since finished jobs are kept in `runs/ablations`. A job
is identified by its settings, not by the code, so delete the folder after a change of the code.
"""
PACKING = """\
## Packing

In the paper (section 3.3, table 3), packing samples to a fixed compute budget gives 4.1 times the throughput of
padding, and packing to a fixed length gives 3.4 times.

Nothing is trained here: the figures are those of the benchmark of packing, `{command}`. It
measures useful tokens a second on a mix of tasks at two levels, and the share of a step in which the faster of two
workers waits for the slower one. All ways have the default attention, which never reads padding, so padding costs less
here than under a mask, and packing gains less than the paper's factors and than the 3 that the benchmark aims at.

| packing | throughput over padding | wait |
|---|---|---|
"""

# What the paper says of the first arm of a claim and its second one.
FINDINGS = {
    "above": "the first is higher",
    "below": "the first is lower",
    "level": "both are level",
}


def page(results: Path) -> str:
    """Returns the whole page, made from the results in a folder."""
    parts = [INTRODUCTION]
    for name in ABLATIONS:
        module = importlib.import_module(name)
        path = results / f"ablation_{name}.json"
        parts.append(section(module.ABLATION, module.__doc__, json.loads(path.read_text()) if path.exists() else None))
    packing = results / "packing.json"
    return "\n".join(parts + ([packing_section(json.loads(packing.read_text()))] if packing.exists() else []))


def section(ablation: Ablation, text: str, result: dict | None) -> str:
    """Returns the section of an ablation: its text, and its table, claims and figure if it has been run."""
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
    """Returns a line that compares what the paper finds for two arms with what came out here."""
    higher = sum(difference > 0 for difference in claim["differences"])
    difference = in_words(mean_and_spread(claim["differences"]))
    return (
        f"- {ablation.scores[claim['score']]}, {claim['first']} minus {claim['second']}: {difference}, positive with "
        f"{higher} of {len(claim['differences'])} seeds. In the paper {FINDINGS[claim['paper']]}: "
        f"**{claim['verdict']}**."
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
