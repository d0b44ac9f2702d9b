"""For a seed the bundled checkpoint keeps its images: their codes are those in `fixtures/golden_codes.safetensors`.

`python tests/generation/test_golden_codes.py` writes the file anew; that is right only where a changelog says that
images change.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from transformers_nextflow import NextFlowPipeline


ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "fixtures" / "golden_codes.safetensors"
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
SHAPES = ("circle", "square", "star", "triangle")
NUMBERS = ("two", "three", "four")


def prompts() -> list[str]:
    """64 prompts: single objects, pairs, counts on a background, relations."""
    named = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES][::2]
    others = named[5:] + named[:5]
    singles = [f"a {name}" for name in named]
    pairs = [f"a {name} and a {other}" for name, other in zip(named, others)]
    counts = [
        f"{NUMBERS[index % 3]} {name}s on a {('white', 'black')[index % 2]} background"
        for index, name in enumerate(named)
    ]
    relations = [f"a {name} left of a {other}" for name, other in zip(named, others)]
    return singles + pairs + counts + relations


def codes() -> dict[str, torch.Tensor]:
    """Codes (64, N) of images from texts, and (16, N) of edits of the first 16 of them."""
    pipe = NextFlowPipeline.from_pretrained(ROOT / "checkpoints" / "nextflow-shapes")
    pipe.set_progress_bar_config(disable=True)

    def seeds(count: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(count)]

    drawn = pipe(prompts(), generator=seeds(64))
    edited = pipe(["make it blue"] * 16, image=drawn.images[:16], generator=seeds(16))
    return {"drawn": drawn.image_tokens.short(), "edited": edited.image_tokens.short()}


def test_a_seed_keeps_its_image():
    golden, found = load_file(GOLDEN), codes()
    for name, expected in golden.items():
        assert torch.equal(found[name], expected), name


if __name__ == "__main__":
    save_file(codes(), GOLDEN)
