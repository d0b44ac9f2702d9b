"""Assemble a checkpoint of the emoji world: a pipeline folder of at most 48 MiB with its card, sheets and NOTICE.

    python examples/emoji/make_checkpoint.py --model runs/emoji/transformer-128/final SAMPLING
    transformers-nextflow evaluate checkpoints/nextflow-emoji --suite emoji --json benchmarks/results/emoji.json \
        --sheets checkpoints/nextflow-emoji
    python examples/emoji/make_checkpoint.py --model runs/emoji/transformer-128/final SAMPLING \
        --results benchmarks/results/emoji.json

At full size weights are written in bfloat16, and those that decide about codes in float32; further training starts from
`--model`, which is in float32 throughout, and never from the checkpoint. The sizes for two cores stay in float32, since
they fit, and processors without bfloat16 units compute bfloat16 several times slower.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from huggingface_hub import ModelCardData
from make_data import MIXTURES
from sizes import FULL, SIZES, world_of
from transformers import GenerationConfig

from transformers_nextflow import ImageSampling, NextFlowPipeline
from transformers_nextflow.data.reconstruction_quality import measure_reconstruction
from transformers_nextflow.worlds.emoji import World, random_scene, render
from transformers_nextflow.worlds.emoji.evaluation import ART
from transformers_nextflow.worlds.emoji.language import style_word
from transformers_nextflow.worlds.emoji.packages import notice, packages_of
from transformers_nextflow.worlds.emoji.statement import trained_on


MAX_BYTES = 48 * 2**20
# Images of which the worst reconstruction is the checkpoint's `lowest_psnr`.
RECONSTRUCTED = 200
SHEET, WIDGET_PROMPT = "drawing.png", "a rocket, 3d style"
INTRODUCTION = """\
# NextFlow on the emoji world

This is a NextFlow ([arXiv 2601.02204](https://arxiv.org/abs/2601.02204)) that draws emoji, scale by scale, in the
styles of several sets: {styles}. It was trained from scratch on the abilities {abilities}, with images of {side}
pixels. It has {total:.1f} million parameters, {vision:.1f} million of them in the vision tokenizer. {knows}

![drawings of held-out prompts]({sheet})

```python
import torch
from transformers_nextflow import NextFlowPipeline

pipe = NextFlowPipeline.from_pretrained("checkpoints/nextflow-emoji")
pipe("{prompt}", generator=torch.Generator().manual_seed(0)).images[0].save("image.png")
```
"""
# A longer list of names tells a reader nothing.
MAX_NAMES = 200
SCORES = """\
## Scores

The scores were computed with `{command}` at commit {commit}, on {device}. A judge, a small network that was trained on
true renders, reads the drawn images. `ceiling` has its scores of the true renders, and `reconstructed` those of the
true renders after they went through the vision tokenizer. Names with a suffix are parts of `right`. The suites
`held_out_…` have scenes with a pair of concept and style, concept and colour, concept and concept, or concept and
number that no training image shows.
"""
MEMORISATION = """\
**Memorisation.** Drawings of one thing on white have {to_nearest:.1f} dB of PSNR to the nearest render of the training,
where reconstructions of these renders have {to_nearest_reconstructed:.1f} dB. The model is meant to learn the renders:
an emoji of a set in its style *is* a training image, so drawings of seen pairs should come near to it. They are derived
works of the sets below.
"""


def card(pipe: NextFlowPipeline, results: dict | None, world: World, abilities: Iterable[str]) -> str:
    """Returns the model card; without results it has no scores."""
    names = sorted(world.name(concept) for concept in world.concepts)
    knows = f"It knows only the {len(names)} concepts of its training"
    knows += f": {', '.join(names)}." if len(names) <= MAX_NAMES else "."
    edits = ["image-to-image"] * ("editing" in abilities)
    data = ModelCardData(
        license="other",
        license_name="emoji-sets",
        license_link="NOTICE",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["nextflow", "text-to-image", *edits, "next-scale-prediction", "emoji"],
        widget=[{"text": WIDGET_PROMPT, "output": {"url": SHEET}}],
    )
    introduction = INTRODUCTION.format(
        total=pipe.model.num_parameters() / 1e6,
        vision=pipe.model.vq_model.num_parameters() / 1e6,
        styles=", ".join(style_word(None, style) for style in world.styles),
        abilities=", ".join(abilities),
        side=world.side,
        knows=knows,
        sheet=SHEET,
        prompt=WIDGET_PROMPT,
    )
    parts = [f"---\n{data.to_yaml()}\n---\n", introduction]
    if results is not None:
        machine = results["machine"]
        parts.append(SCORES.format(device=machine["gpu"] or machine["cpu"], **results))
        parts += [score_table(name, scores) for name, scores in results.items() if _is_suite(name, scores)]
        parts.append(MEMORISATION.format(**results["memorisation"]))
    parts.append(f"## Licences\n\n{notice(packages_of(world.styles))}")
    return "\n".join(parts)


def lowest_psnr(pipe: NextFlowPipeline, world: World) -> float:
    """Returns the lowest PSNR in dB of reconstructions of the world's images."""
    rng = np.random.default_rng(0)
    images = (render(random_scene(rng, world), world) for _ in range(RECONSTRUCTED))
    pixels = (torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1 for image in images)
    return min(measure_reconstruction(pipe.model.vq_model, pixels).psnr)


def _is_suite(name: str, scores) -> bool:
    return isinstance(scores, dict) and name not in ("machine", "stages", "memorisation")


def score_table(name: str, scores: dict) -> str:
    """Returns a table with a row for each score of a suite and its ceilings."""
    ceilings = [title for title in ("ceiling", "reconstructed") if isinstance(scores.get(title), dict)]
    header = [name, "score", *ceilings]
    lines = [header, ["---"] * len(header)]
    for category, score in scores.items():
        if isinstance(score, dict) or "_scale_" in category:
            continue
        beside = [f"{scores[title][category]:.3f}" if category in scores[title] else "" for title in ceilings]
        lines.append([category, f"{score:.3f}", *beside])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@contextmanager
def small_folder(output: Path, max_bytes: int) -> Iterator[Path]:
    """A new folder that is written during the block, and copied to `output` after it.

    Raises:
        ValueError: if it takes more than `max_bytes`; then nothing is copied.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        yield folder
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > max_bytes:
            raise ValueError(f"{output} would take {size / 2**20:.1f} MiB, more than {max_bytes / 2**20:.0f}.")
        shutil.copytree(folder, output, dirs_exist_ok=True)


def save_checkpoint(pipe: NextFlowPipeline, text: str, licences: str, output: Path):
    """Writes the folder. Raises `ValueError` and writes nothing if it would exceed `MAX_BYTES`."""
    with small_folder(output, MAX_BYTES) as folder:
        pipe.save_pretrained(folder)
        (folder / "model" / "README.md").unlink()  # the card is that of the whole folder
        (folder / "README.md").write_text(text, encoding="utf-8")
        (folder / "NOTICE").write_text(licences, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder `final` of the last stage")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--art", type=Path, default=ART)
    parser.add_argument("--output", type=Path, default=Path("checkpoints/nextflow-emoji"))
    parser.add_argument("--results", type=Path, help="file with scores from `evaluate --json`, for the card")
    for name, default in (("guidance_scale", 2.0), ("temperature", 0.8), ("editing_guidance_scale", 1.5)):
        parser.add_argument(
            f"--{name}", type=float, nargs="+", default=[default], help="one number, or one for a scale"
        )
    arguments = parser.parse_args()

    def setting(name: str):
        values = getattr(arguments, name)
        return values[0] if len(values) == 1 else values

    pipe, size = NextFlowPipeline.from_pretrained(arguments.model), SIZES[arguments.size]
    world = world_of(size, arguments.art)
    sampling = ImageSampling(guidance_scale=setting("guidance_scale"), temperature=setting("temperature"))
    editing = ImageSampling(guidance_scale=setting("editing_guidance_scale"), temperature=setting("temperature"))
    tokenizer = pipe.processor.tokenizer
    pipe.model.generation_config = GenerationConfig(
        image_sampling=sampling.to_dict(),
        editing_sampling=editing.to_dict(),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    abilities = MIXTURES[size.name]
    pipe.model.config.trained_on = trained_on(world, abilities, lowest_psnr(pipe, world))
    for named in (pipe.model.config, pipe.model.config.vq_config):
        named._name_or_path = ""  # it names a folder of this machine
    pipe.register_to_config(_name_or_path=arguments.output.name)
    if size is FULL:
        pipe.model.to(torch.bfloat16)  # the parts that decide about codes stay in float32
    results = json.loads(arguments.results.read_text()) if arguments.results else None
    text = card(pipe, results, world, abilities)
    save_checkpoint(pipe, text, notice(packages_of(world.styles)), arguments.output)
    written = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"{arguments.output}: {written / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
