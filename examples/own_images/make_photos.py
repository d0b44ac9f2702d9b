"""Write thirty captioned photographs in place of your own: a folder of images with metadata.jsonl.

    pip install scikit-image scikit-learn
    python examples/own_images/make_photos.py photos

The wheels of these two packages have ten photographs. (scikit-image downloads its other ones on demand, so they are
left out.) Each photograph gives three squares: its middle, and the left and the right part of this square, enlarged.
The packages are not imported; only their files are read.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from transformers_nextflow.utils.atomic_files import atomic_write


SCIKIT_IMAGE, SCIKIT_LEARN = ("skimage", "data"), ("sklearn", "datasets/images")
# For each file: what it shows, and where the middle of its square lies, as a share of the width.
PHOTOGRAPHS = (
    (SCIKIT_IMAGE, "astronaut.png", "an astronaut", 0.5),
    (SCIKIT_IMAGE, "camera.png", "a photographer", 0.5),
    (SCIKIT_IMAGE, "chelsea.png", "a cat", 0.42),
    (SCIKIT_IMAGE, "coffee.png", "a cup of coffee", 0.48),
    (SCIKIT_IMAGE, "coins.png", "old coins", 0.5),
    (SCIKIT_IMAGE, "motorcycle_left.png", "a motorcycle", 0.55),
    (SCIKIT_IMAGE, "retina.jpg", "a retina", 0.5),
    (SCIKIT_IMAGE, "rocket.jpg", "a rocket", 0.5),
    (SCIKIT_LEARN, "china.jpg", "a temple", 0.4),
    (SCIKIT_LEARN, "flower.jpg", "a flower", 0.5),
)
SIDE = 256
# For each part of the square: its share of the side, and where it begins from the left and from the top.
PARTS = {"": (1.0, 0.0, 0.0), ", its left part": (0.75, 0.0, 0.125), ", its right part": (0.75, 0.25, 0.125)}
# A part that is not among the thirty, which tests what a model learnt beyond the pixels of its training.
KEPT = (0.75, 0.125, 0.25)


def photograph(package: tuple[str, str], name: str, middle: float) -> Image.Image:
    """Returns a square of a photograph that a package ships."""
    module, folder = package
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"There is no {module}: pip install scikit-image scikit-learn")
    image = Image.open(Path(spec.submodule_search_locations[0]) / folder / name).convert("RGB")
    side = min(image.size)
    left = min(max(round(middle * image.width - side / 2), 0), image.width - side)
    return image.crop((left, 0, left + side, side))


def part(square: Image.Image, share: float, left: float, top: float) -> Image.Image:
    """Returns a square part, resized to `SIDE` pixels."""
    side = square.width
    box = (left * side, top * side, (left + share) * side, (top + share) * side)
    return square.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)


def photographs() -> list[tuple[str, Image.Image]]:
    """Returns thirty different captions with their images."""
    squares = [(what, photograph(package, name, middle)) for package, name, what, middle in PHOTOGRAPHS]
    return [
        (f"a photo of {what}{which}", part(square, *box)) for what, square in squares for which, box in PARTS.items()
    ]


def kept_photographs() -> list[tuple[str, Image.Image]]:
    """Returns ten more captions and images, of other parts of the same photographs."""
    return [(f"a photo of {what}", part(photograph(*source, middle), *KEPT)) for *source, what, middle in PHOTOGRAPHS]


def write_folder(images: list[tuple[str, Image.Image]], folder: Path):
    """Writes a folder of images with `metadata.jsonl`, as `datasets` reads it."""
    with atomic_write(folder) as partial:
        partial.mkdir(exist_ok=True)
        lines = []
        for number, (caption, image) in enumerate(images):
            name = f"{number:02d}.png"
            image.save(partial / name)
            lines.append(json.dumps({"file_name": name, "text": caption}))
        (partial / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_folder(photographs(), folder)
    print(f"{len(photographs())} images and metadata.jsonl in {folder}")


if __name__ == "__main__":
    main()
