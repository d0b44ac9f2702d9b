"""Test whether a training that was killed and resumed ends with the weights of one that was not (float32, CPU).

    python benchmarks/resume.py

A small random model is trained for a few steps with dropout and shuffled data, so that the step, the order of the data
and the random state all matter. A checkpoint is written every few steps. One process does this without interruption. In
each of `--runs` other runs, a process is killed by SIGKILL, in turn at a random moment after a random step and while a
random checkpoint is being written. A new process then continues with `resume_from_checkpoint=True`. `exact` counts the
runs whose weights equal those of the uninterrupted one bit by bit.
Writes `results/resume.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from backbone import RESULTS
from packing import make_model, make_rows
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer, NextFlowTrainingArguments
from transformers_nextflow.trainers.runs.atomic_checkpoints import PARTIAL


STEPS, SAVE_STEPS = 24, 4
LONGEST = 300
# The longest time to wait for a step, in seconds.
PATIENCE = 600


class ReportSteps(TrainerCallback):
    """Reports which step is done to the process that kills this one."""

    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, flush=True)


def train(folder: str):
    """Trains in `folder`, from its newest checkpoint if there is one, and saves the weights in `folder/final`."""
    torch.set_num_threads(1)
    model, processor = make_model()
    model.config.text_config.attention_dropout = 0.1
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.set_attn_implementation("eager")
    collator = NextFlowCollator(processor)
    rows = [row for row in make_rows(processor, 100) if collator.size(row).length < LONGEST]
    args = NextFlowTrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        save_steps=SAVE_STEPS,
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = NextFlowTrainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[ReportSteps()])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) is not None or None)
    trainer.save_model(f"{folder}/final")


def start(folder: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--train", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def finish(folder: Path) -> str:
    """Trains to the end and returns the hash of the weights."""
    if start(folder).wait() != 0:
        raise RuntimeError(f"The training in {folder} failed; see `python {__file__} --train {folder}`.")
    weights = load_file(folder / "final" / "model.safetensors")
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


def wait_for_step(process: subprocess.Popen, step: int) -> float:
    """Waits until `step` is done; returns the average seconds of a step."""
    begin = None
    for line in process.stdout:
        begin = begin or time.perf_counter()
        if int(line) >= step:
            return (time.perf_counter() - begin) / max(step - 1, 1)
    raise RuntimeError(f"The training ended before step {step}.")


def kill(process: subprocess.Popen):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def kill_after_a_step(folder: Path, generator: random.Random) -> dict:
    """Kills the training within the time of one step after a random step."""
    process, step = start(folder), generator.randint(1, STEPS - 2)
    seconds = wait_for_step(process, step)
    time.sleep(generator.uniform(0, seconds))
    kill(process)
    return {"killed": "after a step", "step": step}


def kill_while_saving(folder: Path, generator: random.Random) -> dict:
    """Kills the training as soon as it begins to write a random checkpoint."""
    process, step = start(folder), SAVE_STEPS * generator.randint(1, STEPS // SAVE_STEPS - 1)
    wait_for_step(process, step - 1)
    until = time.monotonic() + PATIENCE
    partial = folder / PARTIAL / f"checkpoint-{step}"
    while not partial.exists():
        if time.monotonic() > until or process.poll() is not None:
            raise RuntimeError(f"Checkpoint {step} was not begun.")
    kill(process)
    return {"killed": "while a checkpoint was written", "step": step, "half_written": partial.exists()}


def run(folder: Path, number: int, expected: str) -> dict:
    generator = random.Random(number)
    killed = (kill_after_a_step, kill_while_saving)[number % 2](folder, generator)
    newest = get_last_checkpoint(folder)
    resumed_from = int(newest.rpartition("-")[2]) if newest else 0
    return killed | {"resumed_from": resumed_from, "exact": finish(folder) == expected}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--train", metavar="FOLDER", help="be the process that trains; the benchmark itself uses this")
    arguments = parser.parse_args()
    if arguments.train:
        return train(arguments.train)
    with TemporaryDirectory() as folder:
        expected = finish(Path(folder) / "whole")
        runs = []
        for number in range(arguments.runs):
            runs.append(run(Path(folder) / str(number), number, expected))
            print(", ".join(f"{name}: {value}" for name, value in runs[-1].items()))
    lost = max(result["step"] - result["resumed_from"] for result in runs)
    values = {"exact": sum(r["exact"] for r in runs), "of": len(runs), "most_steps_lost": lost, "runs": runs}
    values |= {"steps": STEPS, "save_steps": SAVE_STEPS}
    print(f"exact: {values['exact']} of {values['of']}; {lost} steps lost at most")
    print(write_result(arguments.results / "resume.json", values))


if __name__ == "__main__":
    main()
