"""Extract the codes of 10,000 images by Ray Data on two actors, one of which is killed, and by two processes.

    python benchmarks/ray_extraction.py

The images are scenes of the shapes world, and the tokenizer is that of the shapes checkpoint. The bytes of every shard
are compared. The times at which shards were written show that none was made twice.
Writes `results/ray_extraction.json`: `equal`, `images`, and the seconds of each engine; those of Ray include its start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from backbone import RESULTS
from PIL import Image

from transformers_nextflow.data import extract_codes
from transformers_nextflow.data.code_extraction import ENGINES
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.worlds.shapes.scene import World, random_scene, render


MODEL = Path(__file__).parents[1] / "checkpoints" / "nextflow-shapes"
SHARD = 250


def make_rows(folder: Path, count: int) -> Path:
    world, rng = World(), np.random.default_rng(0)
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(count):
            Image.fromarray(render(random_scene(rng, world), world)).save(folder / f"{number}.png")
            content = [{"type": "image", "image": f"{number}.png"}]
            messages = [{"role": "user", "content": "a scene"}, {"role": "assistant", "content": content}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder / "rows.jsonl"


def kill_an_actor(output: Path, killed: list[int]):
    """Kills one of the processes that make shards when a few shards are there."""
    while len(list(output.glob("codes-*.parquet"))) < 4:
        time.sleep(0.2)
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    pids = [int(line.split()[0]) for line in lines if "ray::MapWorker" in line]
    os.kill(pids[0], signal.SIGKILL)
    killed.append(pids[0])


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("codes-*"))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, seconds, killed = Path(name), {}, []
        source = make_rows(folder, arguments.images)
        for engine in ENGINES:
            output = folder / engine
            if engine == "ray":
                threading.Thread(target=kill_an_actor, args=(output, killed), daemon=True).start()
            start = time.perf_counter()
            totals = extract_codes(source, MODEL, output, 2, engine=engine, shard_size=SHARD)
            seconds[engine] = time.perf_counter() - start
        local, by_ray = (shards(folder / engine) for engine in ENGINES)
    values = {
        "equal": local == by_ray,
        "images": totals["rows"],
        "shards": totals["shards"],
        "actors_killed": len(killed),
        "seconds": seconds,
    }
    print(json.dumps(values, indent=2))
    write_result(RESULTS / "ray_extraction.json", values)


if __name__ == "__main__":
    main()
