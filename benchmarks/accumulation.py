"""Compare the gradient of a step that is computed in parts with that of the undivided batch (float32, CPU).

    python benchmarks/accumulation.py

A small random model takes one step on text, on images and on a mixture, with and without reading the last scale, in
padded batches and in packs. Each batch is divided into micro-batches with different numbers of trained positions. The
step runs in one process and in two (gloo), with `NextFlowTrainer` and with transformers' `Trainer`. The gradient at the
optimiser's step is compared with that of one pass over all rows: the result is the norm of the difference, divided by
the norm, over all parameters together.
Writes `results/accumulation.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from backbone import CHECKPOINT, RESULTS, random_config, with_sides
from tqdm import tqdm
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowImageProcessor, NextFlowProcessor
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.trainers import (
    NextFlowCollator,
    NextFlowTrainer,
    NextFlowTrainingArguments,
    PackedDataset,
)


SIDES, LEVEL_SIDES = (1, 2, 3, 4, 6), (4, 6)
TARGET = 1e-5
KINDS, ROWS = ("text", "images", "mixture"), 4
TRAINERS = {"NextFlowTrainer": NextFlowTrainer, "Trainer": Trainer}


def make_model(read_last_scale: bool) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    """Makes the random model with two layers and a schedule of two levels, and its processor."""
    config = with_sides(random_config(), SIDES, LEVEL_SIDES)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 2, ["full_attention"] * 2
    config.read_last_scale = read_last_scale
    image_processor = NextFlowImageProcessor(SIDES, config.vq_config.patch_size, config.vq_config.levels)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    processor = NextFlowProcessor(image_processor, tokenizer, read_last_scale=read_last_scale)
    for name in ("boi_token_id", "eoi_token_id", "image_token_id"):
        setattr(config, name, getattr(processor, name))
    torch.manual_seed(0)
    return NextFlowForConditionalGeneration(config), processor


def make_rows(processor: NextFlowProcessor, kind: str) -> list[dict]:
    """Makes `ROWS` rows of "text", of "images" or of both, all with different numbers of trained positions."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> dict:
        return {"type": "text", "text": "a red circle " * count}

    def row(question: list[dict], answer: list[dict], sides: tuple[int, ...] = ()) -> dict:
        schedules = [processor.image_processor.schedule_for_grid(side, side) for side in sides]
        return {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "image_grids": [[side, side] for side in sides],
            "image_tokens": [torch.randint(1024, (s.num_tokens,), generator=generator).tolist() for s in schedules],
        }

    image = {"type": "image"}
    texts = [row([words(1)], [words(count)]) for count in (1, 4, 9, 2)]
    drawings = [
        row([words(3)], [image], (4,)),
        row([words(1)], [image], (6,)),
        row([words(2)], [image, words(2)], (4,)),
        row([image, words(1)], [image, image], (4, 6, 4)),
    ]
    return {"text": texts, "images": drawings, "mixture": [drawings[1], texts[0], texts[2], drawings[3]]}[kind]


class KeepGradients(TrainerCallback):
    """Keeps the gradient of all parameters at the optimiser's step, as one vector."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = gradient_of(model)


def gradient_of(model: torch.nn.Module) -> torch.Tensor:
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def in_packs(rows: list[dict], processor: NextFlowProcessor) -> PackedDataset:
    """Returns the rows in two packs of different size."""
    collator = NextFlowCollator(processor)
    lengths = [collator.size(row).length for row in rows]
    packs = PackedDataset(rows, lambda row: collator.size(row).length, max(max(lengths), sum(lengths) - min(lengths)))
    return packs


def difference(kind: str, read_last_scale: bool, packed: bool, trainer: str, processes: int, folder: str) -> float:
    """Runs this process's part of a step in `processes` processes; returns the relative difference to the undivided
    step.
    """
    model, processor = make_model(read_last_scale)
    collator, rows = NextFlowCollator(processor), make_rows(processor, kind)
    model(**collator([rows] if packed else rows)).loss.backward()
    expected = gradient_of(model)
    model.zero_grad()
    data, kept = in_packs(rows, processor) if packed else rows, KeepGradients()
    options = {"remove_unused_columns": False} if trainer == "Trainer" else {}
    if processes > 1:
        options["ddp_backend"] = "gloo"
    args = (TrainingArguments if trainer == "Trainer" else NextFlowTrainingArguments)(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=1,
        # This is more than the epoch has, so the step takes all of its batches.
        gradient_accumulation_steps=ROWS,
        max_grad_norm=0,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        **options,
    )
    TRAINERS[trainer](model, args, train_dataset=data, data_collator=collator, callbacks=[kept]).train()
    return float((kept.gradient - expected).norm() / expected.norm())


def differences(processes: int, folder: str) -> dict[str, float]:
    """Returns the relative difference of each case, by name."""
    values = {}
    cases = list(itertools.product(KINDS, (False, True), (False, True), TRAINERS))
    for kind, read_last_scale, packed, trainer in tqdm(cases, unit="case", desc=f"{processes} processes"):
        name = f"{kind}, {'last scale read' if read_last_scale else 'last scale not read'}, "
        name += f"{'packed' if packed else 'padded'}, {processes} processes, {trainer}"
        values[name] = difference(kind, read_last_scale, packed, trainer, processes, folder)
    return values


def _worker(rank: int, processes: int, port: int, folder: str):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    values = differences(processes, folder)
    if rank == 0:
        (Path(folder) / "differences.json").write_text(json.dumps(values))


def in_processes(processes: int) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, args=(processes, port, folder), nprocs=processes)
        return json.loads((Path(folder) / "differences.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()

    values = {}
    for processes in arguments.processes:
        values |= in_processes(processes)
    largest = max(values.values())
    for name, value in values.items():
        print(f"{value:.1e}  {name}")
    print(f"largest {largest:.1e} (target {TARGET})")
    result = {"largest_relative_difference": largest, "relative_differences": values}
    print("written:", write_result(Path(arguments.results) / "accumulation.json", result))


if __name__ == "__main__":
    main()
