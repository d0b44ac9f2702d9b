"""Simulate the fill of packs, waiting and bytes read with 8 to 1,024 processes, on the sizes of a mixture of tasks.

    python benchmarks/packing_simulation.py

Nothing is trained. Each process draws its own samples: text, drawings, captions, edits and interleaved images in the
shares of `benchmarks/packing.py`, at the paper's three levels and 41 ratios. The lengths of captions and texts are
log-normal. The samples are batched as the trainer does it: padded, in packs of a fixed length and in packs of fixed
compute, with about the same number of positions each. A process takes as long as its batch costs by the 7B model's
`CostModel`, in which padding costs its positions. A step takes as long as its slowest process. The first steps of each
process's first window are counted.

Bytes are those of codes as int16 (read, written and clean ones) and of 4 bytes for each text token. They are given for
processes that read only their own share, and, multiplied by the number of processes, for processes that read
everything. Writes `results/packing_simulation.json`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

from backbone import RESULTS
from packing import MAX_FRAMES, SHARES
from tqdm import tqdm

from transformers_nextflow import NextFlowConfig
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.scale_schedule import BASE_GRIDS, ScaleSchedules
from transformers_nextflow.trainers.packing import WINDOW, CostModel, SampleSize, pack


RANKS = (8, 64, 512, 1024)
# Figures of the paper (section 3.3): throughput over padding.
PAPER = {"length": 3.4, "compute": 4.1}
BYTES_PER_CODE, BYTES_PER_TOKEN = 2, 4
# Number of positions of the chat template around a question and its answer.
TEMPLATE = 12
# Numbers of frames of interleaved samples at the 512 and the 1024 level.
FRAMES = {256: 5, 512: max(MAX_FRAMES.values()), 1024: min(MAX_FRAMES.values())}


@dataclass(frozen=True)
class Sample:
    """The numbers that are counted for a sample."""

    size: SampleSize
    cost: float
    bytes: int


class Samples:
    """Random samples of a stage at some levels."""

    def __init__(self, levels: list[int], schedules: ScaleSchedules, model: CostModel):
        self.levels, self.model = levels, model
        self.schedules = {level: [schedules.build(grid, level) for grid in BASE_GRIDS] for level in levels}

    def draw(self, chance: random.Random) -> Sample:
        def words(mean: int) -> int:
            return 1 + int(chance.lognormvariate(0, 0.7) * mean)

        task, level = chance.choices(list(SHARES), SHARES.values())[0], chance.choice(self.levels)
        schedule = chance.choice(self.schedules[level])
        read, drawn, asked, answered = 0, 0, words(30), 0
        if task == "text":
            asked, answered = words(60), words(250)
        elif task == "drawing":
            drawn = 1
        elif task == "caption":
            read, answered = 1, words(60)
        elif task == "edit":
            read = drawn = 1
        else:
            drawn = chance.randint(2, FRAMES[level])
            answered = drawn * words(20)
        images = read + drawn
        length = TEMPLATE + asked + answered + images * schedule.sequence_length()
        size = SampleSize(length, answered + drawn * schedule.num_tokens, images * (schedule,))
        lists = read + 3 * drawn
        taken = BYTES_PER_CODE * lists * schedule.num_tokens + BYTES_PER_TOKEN * (asked + answered)
        return Sample(size, self.model.cost(size), taken)


def batches_of(packing: str, samples: list[Sample], budgets: dict) -> list[list[Sample]]:
    """Returns the batches of a window of samples, in the order in which the trainer takes them."""
    if packing == "padding":
        count = budgets["padding"]
        return [samples[start : start + count] for start in range(0, len(samples) - count + 1, count)]
    costs = [sample.size.length if packing == "length" else sample.cost for sample in samples]
    packs = list(pack(samples, costs, budgets[packing]))
    random.Random(len(packs)).shuffle(packs)
    return packs


def seconds_of(packing: str, batch: list[Sample]) -> float:
    """Returns the cost of a batch, padding included, in units of a position."""
    cost = sum(sample.cost for sample in batch)
    if packing != "padding":
        return cost
    lengths = [sample.size.length for sample in batch]
    return cost + len(batch) * max(lengths) - sum(lengths)


def figures_of(ranks: int, packing: str, by_rank: list[list[list[Sample]]], steps: int, budget: float) -> dict:
    """Returns the figures of the first `ranks` processes over `steps` steps."""
    own = [batches[:steps] for batches in by_rank[:ranks]]
    seconds = [[seconds_of(packing, batch) for batch in batches] for batches in own]
    slowest = [max(step) for step in zip(*seconds)]
    batches = list(itertools.chain(*own))
    useful = sum(sample.size.length for batch in batches for sample in batch)
    taken = statistics.mean(sum(sample.bytes for sample in batch) for batch in batches)
    filled = {"padding": None, "length": useful / len(batches), "compute": statistics.mean(itertools.chain(*seconds))}
    return {
        "useful_per_cost": useful / ranks / sum(slowest),
        "fill": None if packing == "padding" else round(filled[packing] / budget, 4),
        "wait": round(1 - statistics.mean(itertools.chain(*seconds)) * steps / sum(slowest), 4),
        "bytes_per_rank_and_step": round(taken),
        "bytes_where_each_reads_all": round(taken * ranks),
    }


def simulate(levels: list[int], arguments: argparse.Namespace) -> dict:
    config = NextFlowConfig.nextflow_7b()
    samples = Samples(levels, config.vq_config.scale_schedules, CostModel.from_config(config))
    some = [samples.draw(random.Random(f"size {n}")) for n in range(2000)]
    mean = statistics.mean(sample.size.length for sample in some)
    dearer = statistics.mean(sample.cost for sample in some) / mean
    length = arguments.budget
    budgets = {"padding": max(1, round(length / mean)), "length": length, "compute": round(length * dearer)}
    by_rank: dict[str, list] = {packing: [] for packing in budgets}
    for rank in tqdm(range(max(arguments.ranks)), desc=str(levels), unit="rank"):
        chance = random.Random(f"rank {rank}")
        window = [samples.draw(chance) for _ in range(WINDOW)]
        for packing, made in by_rank.items():
            made.append(batches_of(packing, window, budgets)[: arguments.steps])
    steps = min(len(batches) for made in by_rank.values() for batches in made)
    figures = {}
    for ranks in arguments.ranks:
        ways = {name: figures_of(ranks, name, made, steps, budgets[name]) for name, made in by_rank.items()}
        plain = ways["padding"]["useful_per_cost"]
        for name, way in ways.items():
            way["speedup_over_padding"] = round(way.pop("useful_per_cost") / plain, 2)
            print(f"{levels!s:<18} {ranks:>5} ranks  {name:<8} {way}")
        figures[str(ranks)] = ways
    return {"budgets": budgets, "steps": steps, "mean_length": round(mean), "ranks": figures}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--steps", type=int, default=16, help="steps of each process, at most those of one window")
    parser.add_argument("--budget", type=int, default=65536, help="number of positions of a pack of fixed length")
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    stages = {"256": [256], "512": [512], "all levels": [256, 512, 1024]}
    values = {name: simulate(levels, arguments) for name, levels in stages.items()}
    written = {"simulated": True, "paper_speedup_over_padding": PAPER, "stages": values}
    print("written:", write_result(Path(arguments.results) / "packing_simulation.json", written))


if __name__ == "__main__":
    main()
