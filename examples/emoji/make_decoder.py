"""Assemble the folder of a trained diffusion decoder: bfloat16 weights, a card with scores and a sheet, and NOTICE.

    python examples/emoji/make_decoder.py --decoder runs/emoji/diffusion-decoder/final
    python benchmarks/diffusion_decoder.py --decoder checkpoints/nextflow-emoji-decoder
    python examples/emoji/make_decoder.py --decoder runs/emoji/diffusion-decoder/final \
        --results benchmarks/results/diffusion_decoder.json --sheet docs/diffusion_decoder.png

The scores are those of the weights in bfloat16, so the folder is first written without them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from make_checkpoint import small_folder
from sizes import MEDIUM, SIZES, world_of

from transformers_nextflow.diffusion_decoder import NextFlowDiffusionDecoder
from transformers_nextflow.utils.model_cards import write_card
from transformers_nextflow.worlds.emoji import World
from transformers_nextflow.worlds.emoji.evaluation import ART
from transformers_nextflow.worlds.emoji.packages import notice, packages_of


MAX_BYTES = 24 * 2**20
PROMPT, SHEET = "a rocket, 3d style", "decoded.png"
USE = """\
```python
import torch
from transformers_nextflow import NextFlowPipeline

pipe = NextFlowPipeline.from_pretrained("checkpoints/nextflow-emoji", diffusion_decoder="{folder}")
pipe("{prompt}", decoder="diffusion", generator=torch.Generator().manual_seed(0)).images[0].save("image.png")
```"""
SCORES = """\
`{command}` decoded the codes of {scenes} images at {size} pixels, of pairs of concept and style that the training of
this decoder left out. Sharpness is the energy of gradients, where 1 is that of the rendering. The judge, a small
network that was trained on true renders, reads {judged} of the renderings right.

{table}

![pixel decoder, this decoder, rendering]({sheet})"""


def score_table(results: dict) -> str:
    """Returns the table of both decoders."""
    rows = {"pixel decoder, enlarged": results["pixel_decoder"]}
    for name, row in results["diffusion_decoder"].items():
        steps = name.removesuffix("_steps")
        rows[f"this decoder, {steps} step" + "s" * (steps != "1")] = row
    lines = ["| | judged right | PSNR in dB | SSIM | sharpness | seconds an image |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        seconds = f"{row['seconds']:.2f}" if "seconds" in row else ""
        cells = [f"{row['judged_right']:.3f}", f"{row['psnr']:.1f}", f"{row['ssim']:.3f}", f"{row['sharpness']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def save_decoder(decoder: NextFlowDiffusionDecoder, world: World, output: Path, results: dict | None, sheet: Path):
    """Writes the folder. Raises `ValueError` and writes nothing if it would exceed `MAX_BYTES`."""
    licences = notice(packages_of(world.styles))
    sections = [decoder.card_text(), "## Use", USE.format(folder=output, prompt=PROMPT)]
    if results is not None:
        judged = results["renderings"]["judged_right"]
        sections += ["## Scores", SCORES.format(judged=judged, table=score_table(results), sheet=SHEET, **results)]
    with small_folder(output, MAX_BYTES) as folder:
        decoder.save_pretrained(folder)
        (folder / "NOTICE").write_text(licences, encoding="utf-8")
        if results is not None:
            shutil.copyfile(sheet, folder / SHEET)
        write_card(
            folder, decoder.card_title, [*sections, "## Licences", licences],
            license="other", license_name="emoji-sets", license_link="NOTICE", library_name=decoder.card_library,
            pipeline_tag=decoder.card_pipeline_tag, tags=["nextflow", "next-scale-prediction", "emoji"],
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", required=True, help="folder of the trained decoder")
    parser.add_argument("--size", choices=SIZES, default=MEDIUM.name)
    parser.add_argument("--art", type=Path, default=ART)
    parser.add_argument("--results", type=Path, help="file of benchmarks/diffusion_decoder.py")
    parser.add_argument("--sheet", type=Path, default=Path("docs/diffusion_decoder.png"))
    parser.add_argument("--output", type=Path, default=Path("checkpoints/nextflow-emoji-decoder"))
    options = parser.parse_args()
    results = None if options.results is None else json.loads(options.results.read_text(encoding="utf-8"))
    decoder = NextFlowDiffusionDecoder.from_pretrained(options.decoder, torch_dtype=torch.bfloat16)
    save_decoder(decoder, world_of(SIZES[options.size], options.art), options.output, results, options.sheet)
    print(options.output)


if __name__ == "__main__":
    main()
