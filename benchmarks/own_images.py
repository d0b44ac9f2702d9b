"""Time the commands of docs/own_images.md, from the photographs to the drawn image, and score what they produce.

    pip install scikit-image scikit-learn
    OMP_NUM_THREADS=2 python benchmarks/own_images.py

The script times each command in the first block of the page after the installation. It then measures PSNR:

- of the thirty photographs, reconstructed by the shapes tokenizer and by the trained one;
- of ten other parts of the same photographs, on which nothing was trained;
- of the images that the LoRA draws from each caption, against the photograph, and how often such an image is nearer to
  a part of its own photograph than to any other photograph.

Writes `benchmarks/results/own_images.json` and `docs/own_images.png`. Commands whose result is in `--folder` already
are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.data import load_vision_tokenizer
from transformers_nextflow.data.reconstruction_quality import measure_reconstruction
from transformers_nextflow.evaluation.image_metrics import contact_sheet, decibels
from transformers_nextflow.evaluation.results import write_result


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "own_images.md"
sys.path.insert(0, str(ROOT / "examples" / "own_images"))
from make_photos import PARTS, kept_photographs, photographs  # noqa: E402


def commands() -> list[str]:
    """Returns the commands of the page's first block, without cloning and installing."""
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(), re.S)
    assert block is not None
    return [line for line in block[1].splitlines() if line.startswith(("python examples", "transformers-nextflow"))]


def run(command: str, folder: Path) -> float:
    """Runs a command of the page in a folder that holds the clone's folders; returns its wall time in seconds."""
    program, *arguments = shlex.split(command)
    words = ["-m", "transformers_nextflow.cli"] if program == "transformers-nextflow" else []
    print(command, flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, *words, *arguments], cwd=folder, check=True)
    return round(time.perf_counter() - start, 1)


def run_page(folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoints", "examples"):
        if not (folder / name).exists():
            os.symlink(ROOT / name, folder / name)
    file = folder / "seconds.json"
    seconds = json.loads(file.read_text()) if file.is_file() else {}
    for command in commands():
        if command not in seconds:
            seconds[command] = run(command, folder)
            file.write_text(json.dumps(seconds, indent=2))
    return seconds


def reconstructions(model: Path, images: list[Image.Image]):
    vq_model = load_vision_tokenizer(model)
    pipe_processor = NextFlowPipeline.from_pretrained(ROOT / "checkpoints" / "nextflow-shapes").processor
    processed = [pipe_processor.image_processor(image)["pixel_values"][0] for image in images]
    return measure_reconstruction(vq_model, map(torch.as_tensor, processed))


def pixels(images: list[Image.Image], side: int) -> torch.Tensor:
    """Returns pixels (B, side, side, 3) in [0, 1]."""
    sized = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(sized)) / 255


def drawn_figures(drawn: list[Image.Image], photos: list[Image.Image]) -> dict[str, float]:
    own, given = (pixels(images, drawn[0].width) for images in (photos, drawn))
    psnr = decibels((given[:, None] - own[None]).square().flatten(2).mean(2))  # (drawn, photographs)
    of_photograph = torch.arange(len(photos)) // len(PARTS)
    return {
        "drawn_psnr": psnr.diagonal().mean().item(),
        "drawn_nearest_to_own": (of_photograph[psnr.argmax(1)] == of_photograph).float().mean().item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/own_images"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--sheet", type=Path, default=ROOT / "docs" / "own_images.png")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    seconds = run_page(folder)

    captions, photos = zip(*photographs())
    _, kept = zip(*kept_photographs())
    before = reconstructions(ROOT / "checkpoints" / "nextflow-shapes", list(photos))
    after = reconstructions(folder / "runs/tokenizer/final", list(photos))
    others = reconstructions(folder / "runs/tokenizer/final", list(kept))
    with contextlib.chdir(folder):  # an adapter stores the path of its model as it was given
        pipe = NextFlowPipeline.from_pretrained("runs/lora/final")
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(captions))]
    drawn = pipe(list(captions), generator=generators).images

    values = {
        "minutes": round(sum(seconds.values()) / 60, 2),
        "seconds": seconds,
        "photographs": len(photos),
        "psnr_before": before.mean,
        "psnr_after": after.mean,
        "psnr_after_lowest": min(after.psnr),
        "psnr_of_other_parts": others.mean,
        **drawn_figures(drawn, list(photos)),
        "adapter_mib": (folder / "runs/lora/final/adapter_model.safetensors").stat().st_size / 2**20,
    }
    first = range(0, len(photos), len(PARTS))
    rows = [[fit.pairs[i][1] for i in first] for fit in (before, after)]
    rows = [[after.pairs[i][0] for i in first], *rows, [drawn[i] for i in first]]
    sheet = contact_sheet(rows)
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(arguments.sheet)
    print(json.dumps(values, indent=2))
    print("written:", write_result(arguments.results / "own_images.json", values))


if __name__ == "__main__":
    main()
