"""Run all stages of the paper's training in a row, from random weights to RL; each is killed once and resumed.

    python benchmarks/dry_run.py                     # two cores, a small backbone
    python benchmarks/dry_run.py --size 1b --steps 50    # one card

The start is a model with random weights in the shape of Qwen2.5-VL, with the layout of the full-size tokenizer (18
scales, levels of 256, 512 and 1,024 pixels). It is trained on random codes and words by the package's own recipes, with
the changes for its size in `recipes/dry_run`: `transformers-nextflow train alignment`, then pretraining at the three
levels, continued training, fine-tuning and RL. Each stage starts from the `final` of the stage before, is killed by
SIGKILL when its first checkpoint is there, and is resumed.

For each stage the script reports the seconds of a step, tokens a second, fill and the wait for data (for RL only the
first of these), the largest memory of its processes, and how far the weights of each part moved, as a share of the sum
of the learning rates. The parts that the recipe does not train must not move, and the others must.
Writes `results/dry_run.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import yaml
from backbone import RESULTS
from safetensors.torch import load_file
from transformers import Qwen2_5_VLTextConfig

from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
    NextFlowVQConfig,
)
from transformers_nextflow.data import code_extraction
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.scale_schedule import SQUARE_SIDES
from transformers_nextflow.tokenization_nextflow import train_tokenizer
from transformers_nextflow.trainers.presets import PRESETS
from transformers_nextflow.trainers.recipes import RECIPES, load_recipe
from transformers_nextflow.vision_tokenizer.fingerprint import tokenizer_fingerprint


SIZES = RECIPES / "dry_run"
LEVELS = ((256, 12), (512, 16), (1024, 18))
WORDS = ["a", "red", "blue", "circle", "star", "two", "of", "them", "what", "is", "here"]
# How the names of weights begin, by part of a recipe. No stage trains the last part.
PARTS = {
    "visual_embedding": "model.visual_embedding.",
    "heads": ("lm_head.", "visual_head."),
    "text_embedding": "model.language_model.embed_tokens.",
    "backbone": "model.language_model.",
    "vision_tokenizer": "model.vq_model.",
}
# A stage that takes longer than this many seconds counts as failed.
PATIENCE = 3600


def make_start(size: dict, folder: Path):
    """Makes a model with random weights, and its processor."""
    tokenizer = train_tokenizer([" ".join(WORDS)], vocab_size=512)
    processor = NextFlowProcessor(NextFlowImageProcessor(SQUARE_SIDES, 16, LEVELS), tokenizer)
    tower = PRESETS["tiny"]
    vq_config = NextFlowVQConfig(
        semantic_config={
            "model_type": "siglip_vision_model", "image_size": 256, "patch_size": 16, "vision_use_head": False,
            **tower.semantic,
        },
        patch_size=16,
        scales=SQUARE_SIDES,
        levels=LEVELS,
        codebook_size=size["codebook_size"],
        semantic_target_dim=tower.semantic["hidden_size"],
        **tower.pixel,
    )  # fmt: skip
    text = {"vocab_size": -(-len(tokenizer) // 8) * 8, "max_position_embeddings": 32768} | size["text"]
    frequencies = text["hidden_size"] // text["num_attention_heads"] // 2
    spatial = frequencies * 3 // 8
    text_config = Qwen2_5_VLTextConfig(
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [frequencies - 2 * spatial, spatial, spatial],
        },
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **text,
    )
    names = {name: getattr(processor, name) for name in ("boi_token_id", "eoi_token_id", "image_token_id")}
    torch.manual_seed(0)
    model = NextFlowForConditionalGeneration(NextFlowConfig(text_config=text_config, vq_config=vq_config, **names))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def make_data(size: dict, model: NextFlowForConditionalGeneration, folder: Path):
    """Makes random rows of levels, texts and conversations, as `extract-codes` writes them, and prompts for RL."""
    chance, fingerprint = random.Random(0), tokenizer_fingerprint(model.vq_model)
    schedules = model.config.vq_config.scale_schedules

    def words(count: int) -> dict:
        return {"type": "text", "text": " ".join(chance.choices(WORDS, k=count))}

    def row(question: list[dict], answer: list[dict], level: int | None = None) -> dict:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if level is None:
            return {"messages": messages}
        schedule = schedules.build(level=level)
        codes = [[chance.randrange(size["codebook_size"]) for _ in range(schedule.num_tokens)]]
        grids = [list(schedule.final_grid)]
        names = ("image_tokens", "image_labels")
        return {
            "messages": messages,
            **dict.fromkeys(names, codes),
            "image_grids": grids,
            "tokenizer_fingerprint": fingerprint,
        }

    def write(name: str, rows: list[dict]):
        (folder / name).mkdir(parents=True)
        code_extraction._write_parquet(rows, folder / name / "codes-000000.parquet", size["codebook_size"])

    image = {"type": "image"}
    for level, _ in LEVELS:
        write(f"images-{level}", [row([words(12)], [image], level) for _ in range(size["rows"])])
    write("text", [row([words(8)], [words(40)]) for _ in range(4 * size["rows"])])
    write("conversations", [row([image, words(6)], [words(10)], 256) for _ in range(size["rows"])])
    prompts = [{"prompt": words(6)["text"], "height": 256, "width": 256} for _ in range(size["rows"])]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def changes_of(stage: str, size: dict, steps: int) -> list[str]:
    """Returns the changes of the dry run to a stage's recipe."""
    saved = max(1, steps // 2)
    changes = [*size["changes"], f"max_steps={steps}", f"save_steps={saved}", "logging_steps=1"]
    changes += [] if stage == "rl" else size["training"]
    return changes + size["stages"][stage]["changes"]


def run_stage(stage: str, size: dict, steps: int, start: Path, data: Path, output: Path) -> dict:
    """Trains a stage, kills it when its first checkpoint is there, and resumes it."""
    command = [sys.executable, "-m", "transformers_nextflow.cli", "train", stage, "--model", str(start)]
    command += ["--data", str(data / size["stages"][stage]["data"]), "--output", str(output)]
    for change in changes_of(stage, size, steps):
        command += ["--set", change]
    begun = time.perf_counter()
    killed, memory = run_until(command, output / f"checkpoint-{max(1, steps // 2)}")
    if killed:
        ended, more = run_until([*command, "--resume"], None)
        memory = max(memory, more)
    seconds = time.perf_counter() - begun
    state = json.loads((output / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    rate = sum(entry["learning_rate"] for entry in logs)
    moved = movements(start / "model.safetensors", output / "final" / "model.safetensors", rate)
    trained = load_recipe(stage).train
    figures = {"killed": killed, "steps": state["global_step"], "seconds": round(seconds, 1), "peak_mib": round(memory)}
    for name in ("tokens_per_second", "fill", "data_wait", "step_time"):
        if values := [entry[name] for entry in logs if name in entry]:
            figures[name] = round(median(values), 3)
    figures["loss"] = [round(logs[0]["loss"], 3), round(logs[-1]["loss"], 3)]
    figures["moved"] = moved
    figures["as_it_should"] = all((moved[part]["largest"] > 0) == (part in trained) for part in PARTS)
    return figures


def run_until(command: list[str], path: Path | None) -> tuple[bool, float]:
    """Runs a command and kills it when `path` exists. Returns whether it was killed, and its peak memory in MiB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    killed, begun = False, time.perf_counter()
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        late = time.perf_counter() - begun > PATIENCE
        if not killed and (late or (path is not None and path.is_dir())):
            os.kill(process.pid, signal.SIGKILL)
            killed = True
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    errors = process.stderr.read()
    if late or (not killed and process.returncode):
        raise RuntimeError(f"{' '.join(command)} failed: {errors[-2000:]}")
    return killed, usage.ru_maxrss / 1024


def movements(before: Path, after: Path, rate: float) -> dict[str, dict[str, float]]:
    """Returns the largest and the mean movement of each part's weights, as shares of the sum of the learning rates."""
    old, new = load_file(before), load_file(after)
    moved: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
    for name, weight in new.items():
        part = next(part for part in ("vision_tokenizer", *PARTS) if name.startswith(PARTS[part]))
        moved[part].append((weight.float() - old[name].float()).abs().flatten())
    distances = {part: torch.cat(own) / rate for part, own in moved.items()}
    return {
        part: {"largest": float(f"{d.max():.3g}"), "mean": float(f"{d.mean():.3g}")} for part, d in distances.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="cpu", choices=sorted(path.stem for path in SIZES.glob("*.yaml")))
    parser.add_argument("--steps", type=int, default=4, help="training steps of each stage, at least two")
    parser.add_argument("--stages", nargs="+", help="names of the stages to run, from the first on; default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, as written to the result file")
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    size = yaml.safe_load((SIZES / f"{arguments.size}.yaml").read_text())
    stages = arguments.stages or list(size["stages"])
    values: dict = {"size": arguments.size, "stages": {}}
    with TemporaryDirectory() as folder:
        place = Path(folder)
        start, data = place / "start", place / "data"
        model = make_start(size, start)
        values["parameters"] = model.num_parameters()
        make_data(size, model, data)
        for stage in stages:
            output = place / stage
            values["stages"][stage] = run_stage(stage, size, arguments.steps, start, data, output)
            start = output / "final"
            print(stage, values["stages"][stage], flush=True)
    figures = values["stages"].values()
    values["all_killed_and_resumed"] = all(stage["killed"] for stage in figures)
    values["all_moved_as_they_should"] = all(stage["as_it_should"] for stage in figures)
    print("written:", write_result(Path(arguments.results) / "dry_run.json", values, arguments.device))
    if not (values["all_killed_and_resumed"] and values["all_moved_as_they_should"]):
        raise SystemExit("A stage was not resumed, frozen weights moved, or trained weights did not move.")


if __name__ == "__main__":
    main()
