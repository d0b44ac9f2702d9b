"""Run the whole recipe on two cores, from the archive of drawings to scores.

    python examples/emoji/make_art.py --output runs/emoji/art.zip
    OMP_NUM_THREADS=1 python examples/emoji/two_cores.py --size small --output runs/emoji/small
    OMP_NUM_THREADS=1 python examples/emoji/two_cores.py --size medium --output runs/emoji/medium

"small" tests the recipe within 45 minutes; it has 60 concepts and the patch kind of pixel branch. "medium" takes some
hours; it has 100 concepts and a convolutional pixel decoder. Both have images of 64 pixels in three styles. Each stage
has a number of minutes. A short run measures the time of a step on this machine, from which the number of steps
follows. Finished stages are not run again, and a training resumes from its newest checkpoint, so the same command
continues after a kill. Writes `benchmarks/results/emoji_SIZE.json` and the folder `checkpoint` with its card.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from make_data import MIXTURES

from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.worlds.emoji.evaluation import evaluate_emoji


ROOT = Path(__file__).parents[2]
HERE, RECIPES = Path(__file__).parent, Path(__file__).parent / "recipes"
RESULTS = ROOT / "benchmarks" / "results"
TIMED_STEPS = 12
DECAY_SHARE = 0.45
CORRECTION = {"share": 0.3, "top_k": 4}
PROCESSES = 2
LIMIT = 100
TOGETHER = ["--set", "use_cpu=true", "--set", "ddp_backend=gloo"]


@dataclass(frozen=True)
class Plan:
    """How long the stages of a size take.

    Args:
        minutes: minutes of each stage, in their order. Starting the processes takes a few more in total.
        samples: number of conversations on which the transformer is trained.
    """

    minutes: dict[str, float]
    samples: int


PLANS = {
    "small": Plan(
        {"judges": 3.5, "tokenizer": 10.0, "decoder": 2.0, "data": 1.5, "transformer": 20.0, "scores": 4.0}, 24_000
    ),
    "medium": Plan(
        {"judges": 6.0, "tokenizer": 75.0, "decoder": 15.0, "data": 6.0, "transformer": 150.0, "scores": 8.0}, 88_000
    ),
}


def seconds_of_step(log: str) -> float:
    """Returns the time of a step by the log of a short training.

    The transformer's log has it for each of its entries, and its last one is without the time of compiling.
    """
    if of_entries := re.findall(r"'seconds_per_step': '?([\d.]+)", log):
        return float(of_entries[-1])
    return 1 / float(re.findall(r"'train_steps_per_second': '?([\d.]+)", log)[-1])


class TwoCorePath:
    """The stages of a size, in a folder; `minutes` and `steps` of what was done lie in its `stages.json`."""

    def __init__(self, size: str, art: Path, output: Path, share: float):
        self.size, self.plan, self.art, self.output, self.share = size, PLANS[size], art, output, share
        self.file = output / "stages.json"
        self.done: dict[str, dict] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.common = ["--size", size, "--art", str(art)]

    def stage(self, name: str, work):
        """Runs a stage unless it is done, and notes its time; `work()` returns what else is noted."""
        if name in self.done:
            return
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        start = time.perf_counter()
        noted = work() or {}
        self.done[name] = {"minutes": round((time.perf_counter() - start) / 60, 2)} | noted
        self.file.write_text(json.dumps(self.done, indent=2))

    def recipe(self, stage: str) -> str:
        return str(RECIPES / f"{self.size}_{stage}.yaml")

    def log(self, name: str):
        return open(self.output / f"{name}.log", "ab")

    def judges(self):
        """Trains the judge and a second one for the perceptual loss, side by side."""
        minutes = str(self.plan.minutes["judges"] * self.share)
        runs = []
        for seed, folder in ((0, "judge"), (2, "judge-2")):
            command = [str(HERE / "train_judge.py"), *self.common, "--output", str(self.output / folder)]
            command += ["--minutes", minutes, "--seed", str(seed)]
            runs.append(subprocess.Popen([sys.executable, *command], stdout=self.log(folder), stderr=self.log(folder)))
        if any([run.wait() for run in runs]):
            raise RuntimeError(f"Training a judge failed: see {self.output}/judge*.log.")

    def train(self, name: str, command: list[str], timed: list[str] = (), settings=lambda steps: []) -> dict:
        """Trains for the minutes of a stage in two processes; returns the number of steps and the seconds of one."""
        together = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
        # The number is chosen only once, since a resumed training must keep its number of steps.
        plan = self.output / f"{name}.json"
        if not plan.is_file():
            short = [*together, *command, "--output", str(self.output / f"{name}-timed"), *TOGETHER, *timed]
            self.run(f"{name}-timed", [*short, "--set", f"max_steps={TIMED_STEPS}", "--set", "logging_steps=4"])
            seconds = seconds_of_step((self.output / f"{name}-timed.log").read_text())
            steps = max(TIMED_STEPS, round(60 * self.plan.minutes[name] * self.share / seconds))
            plan.write_text(json.dumps({"steps": steps, "seconds_a_step": round(seconds, 3)}))
        planned = json.loads(plan.read_text())
        folder = self.output / name
        again = ["--resume"] if list(folder.glob("checkpoint-*")) else []
        run = [*together, *command, "--output", str(folder), *TOGETHER, *again]
        self.run(name, [*run, "--set", f"max_steps={planned['steps']}", *settings(planned["steps"])])
        return planned

    def run(self, name: str, command: list[str]):
        with self.log(name) as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            if subprocess.run(command, stdout=log, stderr=log, env=environment, cwd=ROOT).returncode:
                raise RuntimeError(f"The stage {name} failed: see {self.output / name}.log.")

    def tokenizer(self) -> dict:
        command = [str(HERE / "train_tokenizer.py"), self.recipe("tokenizer"), *self.common]
        command += ["--set", "ddp_find_unused_parameters=true"]
        # Steps are timed with codes, which take longer than steps without.
        return self.train("tokenizer", command, ["--set", "autoencoder_share=0"])

    def decoder(self) -> dict:
        command = [str(HERE / "train_tokenizer.py"), self.recipe("decoder"), *self.common]
        command += ["--model", str(self.output / "tokenizer" / "final"), "--judge", str(self.output / "judge-2")]
        command += ["--set", "ddp_find_unused_parameters=true"]
        return self.train("decoder", command, ["--set", "eval_strategy='no'"])

    def data(self):
        command = [sys.executable, str(HERE / "make_data.py"), *self.common]
        command += ["--tokenizer", str(self.output / "decoder" / "final"), "--output", str(self.output / "data")]
        command += ["--samples", str(round(self.plan.samples * self.share)), "--processes", str(PROCESSES)]
        command += ["--start", str(self.output / "start"), "--correction_share", str(CORRECTION["share"])]
        self.run("data", [*command, "--correction_top_k", str(CORRECTION["top_k"])])

    def transformer(self) -> dict:
        command = ["-m", "transformers_nextflow.cli", "train", self.recipe("transformer")]
        command += ["--model", str(self.output / "start"), "--data", str(self.output / "data")]

        def decay(steps: int) -> list[str]:
            values = f"{{num_decay_steps: {round(DECAY_SHARE * steps)}, decay_type: linear, min_lr_ratio: 0.0}}"
            return ["--set", f"lr_scheduler_kwargs={values}"]

        return self.train("transformer", command, settings=decay)

    def checkpoint(self, *options: str):
        """The folder that is shipped."""
        command = [sys.executable, str(HERE / "make_checkpoint.py"), *self.common, *options]
        command += ["--model", str(self.output / "transformer" / "final"), "--output", str(self.output / "checkpoint")]
        self.run("checkpoint", command)

    def scores(self):
        self.checkpoint()
        scores = evaluate_emoji(
            str(self.output / "checkpoint"),
            max(4, round(LIMIT * self.share)),
            sheets=self.output / "checkpoint",
            art=self.art,
            judge=self.output / "judge",
            abilities=tuple(MIXTURES[self.size]),
        )
        (self.output / "scores.json").write_text(json.dumps(scores, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PLANS, default="small")
    parser.add_argument("--art", type=Path, default=Path("runs/emoji/art.zip"))
    parser.add_argument("--output", type=Path, help="default: runs/emoji/SIZE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--share", type=float, default=1.0, help="share of all minutes and samples, to try the recipe")
    arguments = parser.parse_args()
    output = (arguments.output or Path("runs/emoji") / arguments.size).absolute()
    output.mkdir(parents=True, exist_ok=True)
    path = TwoCorePath(arguments.size, arguments.art.absolute(), output, arguments.share)
    work = (path.judges, path.tokenizer, path.decoder, path.data, path.transformer, path.scores)
    for name, stage in zip(path.plan.minutes, work):
        path.stage(name, stage)
    scores = json.loads((path.output / "scores.json").read_text())
    minutes = sum(stage["minutes"] for stage in path.done.values())
    values = {"minutes": round(minutes, 1), "stages": path.done, **scores}
    print(json.dumps(values, indent=2))
    written = write_result(arguments.results / f"emoji_{arguments.size}.json", values)
    print("written:", written)
    path.checkpoint("--results", str(written))


if __name__ == "__main__":
    main()
