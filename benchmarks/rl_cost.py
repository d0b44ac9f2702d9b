"""Measure the cost of an RL training step on the first scales of an image and on all scales: seconds and peak memory.

    python benchmarks/rl_cost.py

A step computes the log-probabilities of one image of the 1024 level (18 scales, 10,084 codes) behind a prompt of 16
tokens, their weighted sum and its backward pass, without drawing and without the optimizer. Each case runs in its own
process. Memory is the peak above the memory of the loaded model: activations, gradients and masks. Seconds are medians
after a warm-up.
Writes `results/rl_cost.json`: `seconds_ratio` and `memory_ratio`, those of all scales divided by those of the first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from backbone import RANDOM_BACKBONES, RESULTS, load_model, random_prompt

from transformers_nextflow import ImageSampling
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.generation.cached_sequences import Prompts
from transformers_nextflow.generation.prefix_likelihood import prefix_log_probabilities
from transformers_nextflow.generation.scale_loop import ImageCodes
from transformers_nextflow.scale_schedule import SQUARE_SIDES
from transformers_nextflow.trainers.rl.prefix_objective import scale_shares


PROMPT_LENGTH = 16


class PeakMemory:
    """Measures the peak bytes of a block above those before it; on a CPU those that Linux counts as resident."""

    def __init__(self, device: str):
        self.device = torch.device(device)

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *_):
        is_cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if is_cuda else self._resident("VmHWM")
        self.bytes = max(0, peak - self.before)  # Linux counts resident pages of threads with a delay

    def _resident(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(
    name: str, sides: tuple[int, ...], num_scales: int, device: str, dtype: torch.dtype, batch: int, repeats: int
) -> dict[str, float]:
    """Returns seconds and bytes of one step on images of a schedule with these sides."""
    model = load_model(name, sides, (sides[-1],), device, dtype).train()
    schedule = model.config.vq_config.scale_schedules.build()
    drawing = ImageCodes(model, [schedule] * batch, ImageSampling())
    codes = torch.randint(model.config.vq_config.codebook_size, (batch, schedule.num_tokens))
    drawing.image_tokens = codes.to(device)
    prompts = Prompts(random_prompt(model.config, PROMPT_LENGTH, device).expand(batch, -1))

    def step() -> float:
        start = time.perf_counter()
        found = prefix_log_probabilities(model, prompts, [], drawing, num_scales)
        weights = scale_shares(drawing.schedules, found.columns, alpha=0.9)
        (found.values * weights).sum().backward()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with PeakMemory(device) as memory:
        step()
    seconds = statistics.median(step() for _ in range(repeats))
    return {"codes": schedule.offsets[num_scales], "seconds": seconds, "peak_bytes": memory.bytes}


def in_own_process(*arguments) -> dict[str, float]:
    """Runs a case in its own process, since memory that the allocator keeps would hide the use of the next case."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help=f"a checkpoint, or one of {list(RANDOM_BACKBONES)}")
    parser.add_argument("--num_prefix_scales", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()

    options = arguments.device, getattr(torch, arguments.dtype), arguments.batch_size, arguments.repeats
    counts = {"prefix": arguments.num_prefix_scales, "all": len(SQUARE_SIDES)}
    cases = {
        name: in_own_process(arguments.model, SQUARE_SIDES, num_scales, *options) | {"scales": num_scales}
        for name, num_scales in counts.items()
    }
    for name, case in cases.items():
        print(
            f"{name:<7} {case['scales']:>3} scales {case['codes']:>6} codes {case['seconds']:>9.3f} s "
            f"{case['peak_bytes'] / 2**20:>9.0f} MiB"
        )
    ratios = {
        "seconds_ratio": round(cases["all"]["seconds"] / cases["prefix"]["seconds"], 2),
        "memory_ratio": round(cases["all"]["peak_bytes"] / cases["prefix"]["peak_bytes"], 2),
    }
    print(*(f"{name} {value}" for name, value in ratios.items()), sep="\n")
    values = ratios | {"model": arguments.model, "batch_size": arguments.batch_size, "cases": cases}
    print("written:", write_result(Path(arguments.results) / "rl_cost.json", values, arguments.device))


if __name__ == "__main__":
    main()
