"""A small network that reads an image of the emoji world back into its scene: the judge of what models draw.

It is trained on augmented true renders (`examples/emoji/train_judge.py`) with a seed of its own, and is never the
reward of a model that it judges. It takes two kinds of looks: at the whole image for the grid of places and which of
them are occupied, and at each occupied place for the sticker there. The background is read from the image's border.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ...utils.atomic_files import atomic_write
from .coloring import HUES
from .concepts import TONES
from .scene import (
    BACKGROUNDS,
    GRIDS,
    SQUARE,
    TURNS,
    Scene,
    Sticker,
    World,
    box,
    cells_of,
    render,
)


SIDE = 64  # side in pixels to which the network's looks are resized
MAX_CELLS = max(rows * columns for rows, columns in GRIDS)
BATCH_SIZE = 256
# Head → the attribute of a sticker that it predicts.
ATTRIBUTES = {"concepts": "concept", "styles": "style", "colors": "color", "tones": "tone", "turns": "turn"}
WEIGHTS, SETTINGS = "judge.safetensors", "judge.json"


@dataclass(frozen=True)
class Vocabulary:
    """The classes that a judge distinguishes; the index of a class is its place.

    Args:
        concepts, styles: keys and names.
    """

    concepts: tuple[str, ...]
    styles: tuple[str, ...]

    colors = (None, *HUES)
    tones = (None, *TONES.values())
    turns = tuple(TURNS)

    @property
    def heads(self) -> dict[str, int]:
        """Sizes of the heads: of a look at a place, and of one at the whole image."""
        return {name: len(getattr(self, name)) for name in ATTRIBUTES} | {"grids": len(GRIDS), "cells": MAX_CELLS}


class Judge(nn.Module):
    """The network.

    Args:
        vocabulary: the classes that it distinguishes.
        width: channels of the first layer; they double with each of three halvings.
        seed: seed of its training, which is stored so that a reward can be distinguished from a judge.
    """

    def __init__(self, vocabulary: Vocabulary, width: int = 32, seed: int = 0):
        super().__init__()
        self.vocabulary, self.width, self.seed = vocabulary, width, seed
        widths = [width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 5, stride=2, padding=2), nn.BatchNorm2d(width), nn.ReLU()]
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        # The layout depends on where things are, so the last 4 x 4 places are not pooled.
        self.embedding = nn.Sequential(nn.Flatten(), nn.Linear(16 * widths[-1], 8 * width), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(8 * width, size) for name, size in vocabulary.heads.items()})

    def embed(self, looks: torch.Tensor) -> torch.Tensor:
        """Looks (n, 3, 64, 64) in [-1, 1] → (n, 8 * width) features."""
        return self.embedding(self.layers(looks))

    def forward(self, looks: torch.Tensor) -> dict[str, torch.Tensor]:
        """Looks (n, 3, 64, 64) in [-1, 1] → logits (n, classes) by head."""
        features = self.embed(looks)
        return {name: head(features) for name, head in self.heads.items()}

    def features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Maps after each halving of images (B, 3, H, W), for a perceptual distance; gradients flow through."""
        found, hidden = [], pixels
        for layer in self.layers:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU):
                found.append(hidden)
        return found

    # --- Reading -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, images: Sequence[np.ndarray | Image.Image]) -> list[Scene]:
        """The scenes in images, PIL or (H, W, 3) uint8; their aspect ratio is always given as square."""
        self.eval()
        arrays = [as_array(image) for image in images]
        layouts = self._classify([look(array) for array in arrays])
        found, looks = [], []
        for index, array in enumerate(arrays):
            grid = GRIDS[int(layouts["grids"][index].argmax())]
            cells = cells_of(grid)
            taken = [cell for i, cell in enumerate(cells) if layouts["cells"][index][i] > 0]
            if not taken:
                taken = [cells[int(layouts["cells"][index][: len(cells)].argmax())]]
            found.append((grid, taken))
            looks += [look(array, grid, cell) for cell in taken]
        contents = self._classify(looks)
        picked = {
            name: contents[name].argmax(-1).tolist() for name in ("concepts", "styles", "colors", "tones", "turns")
        }
        scenes, start = [], 0
        for array, (grid, taken) in zip(arrays, found):
            numbers = range(start, start + len(taken))
            stickers = tuple(self._sticker(picked, number, cell) for number, cell in zip(numbers, taken))
            scenes.append(Scene(stickers, read_background(array), grid, SQUARE))
            start += len(taken)
        return scenes

    @torch.no_grad()
    def embed_images(self, images: Sequence[np.ndarray | Image.Image]) -> torch.Tensor:
        """Feature vectors (n, D) of unit length of whole images, on the CPU."""
        self.eval()
        looks = torch.stack([look(as_array(image)) for image in images])
        vectors = [self.embed(chunk.to(self.device)).cpu() for chunk in looks.split(BATCH_SIZE)]
        return F.normalize(torch.cat(vectors), dim=-1)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _classify(self, looks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        chunks = [self(chunk.to(self.device)) for chunk in torch.stack(looks).split(BATCH_SIZE)]
        return {name: torch.cat([chunk[name] for chunk in chunks]).cpu() for name in chunks[0]}

    def _sticker(self, picked: dict[str, list[int]], number: int, cell: tuple[int, int]) -> Sticker:
        named = {
            attribute: getattr(self.vocabulary, name)[picked[name][number]] for name, attribute in ATTRIBUTES.items()
        }
        return Sticker(cell=cell, **named)

    # --- Files -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str):
        """Write weights and vocabulary to a folder."""
        settings = {
            "concepts": self.vocabulary.concepts,
            "styles": self.vocabulary.styles,
            "width": self.width,
            "seed": self.seed,
        }
        with atomic_write(folder) as partial:
            partial.mkdir()
            save_file({name: weight.contiguous() for name, weight in self.state_dict().items()}, partial / WEIGHTS)
            (partial / SETTINGS).write_text(json.dumps(settings))

    @classmethod
    def load(cls, folder: Path | str) -> Judge:
        """A judge that `save` wrote. Raises `ValueError` if there is none."""
        folder = Path(folder)
        if not (folder / SETTINGS).is_file():
            raise ValueError(f"There is no judge in {folder}; train one: python examples/emoji/train_judge.py.")
        settings = json.loads((folder / SETTINGS).read_text())
        vocabulary = Vocabulary(tuple(settings["concepts"]), tuple(settings["styles"]))
        judge = cls(vocabulary, settings["width"], settings["seed"])
        judge.load_state_dict(load_file(folder / WEIGHTS))
        return judge.eval()


def as_array(image: np.ndarray | Image.Image) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)


def look(image: np.ndarray, grid: tuple[int, int] | None = None, cell: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """An image (H, W, 3) uint8, or the square of one of its places, as the network sees it: (3, 64, 64) in [-1, 1]."""
    if grid is not None:
        top, left, side = box(grid, cell, image.shape[:2])
        image = image[top : top + side, left : left + side]
    scaled = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1) / 127.5 - 1


def read_background(image: np.ndarray) -> str:
    """The background nearest to the median of the image's border."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    median = np.median(border, axis=0)
    return min(BACKGROUNDS, key=lambda name: float(np.square(median - np.array(BACKGROUNDS[name])).sum()))


# --- Training --------------------------------------------------------------------------------------------------------


def augment(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8, augmented as if a model had drawn it: shifted, blurred, with other brightness, and
    noise.
    """
    height, width = image.shape[:2]
    if rng.random() < 0.7:
        down, right = rng.integers(-2, 3, 2) * max(1, height // 64)
        image = np.pad(image, ((abs(down),) * 2, (abs(right),) * 2, (0, 0)), mode="edge")
        top, left = abs(down) + down, abs(right) + right
        image = image[top : top + height, left : left + width]
    if rng.random() < 0.7:
        factor = rng.uniform(0.25, 0.9)
        size = max(4, round(width * factor)), max(4, round(height * factor))
        small = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
        image = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
    values = image.astype(np.float32)
    if rng.random() < 0.5:
        values = (values - 128) * rng.uniform(0.8, 1.15) + 128 + rng.uniform(-15, 15, 3)
    if rng.random() < 0.5:
        values = values + rng.normal(0, rng.uniform(2, 14), values.shape)
    return np.rint(values).clip(0, 255).astype(np.uint8)


def training_looks(
    rng: np.random.Generator, scene: Scene, world: World, vocabulary: Vocabulary
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Looks (1 + stickers, 3, 64, 64) at an augmented scene, whole and place by place, and their classes.

    Classes (1 + stickers,) by head, -100 where a look has none of it; of "cells" (1 + stickers, places) in {0, 1}, and
    -1 for what does not count.
    """
    image = augment(rng, render(scene, world))
    looks = [look(image)] + [look(image, scene.grid, sticker.cell) for sticker in scene.stickers]
    classes = {name: torch.full((len(looks),), -100) for name in vocabulary.heads if name != "cells"}
    classes["grids"][0] = GRIDS.index(scene.grid)
    cells = torch.full((len(looks), MAX_CELLS), -1.0)
    taken = {sticker.cell for sticker in scene.stickers}
    for i, cell in enumerate(scene.cells):
        cells[0, i] = float(cell in taken)
    for number, sticker in enumerate(scene.stickers, start=1):
        for name, attribute in ATTRIBUTES.items():
            classes[name][number] = getattr(vocabulary, name).index(getattr(sticker, attribute))
    return torch.stack(looks), classes | {"cells": cells}


def judge_loss(logits: dict[str, torch.Tensor], classes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the heads' mean cross-entropies."""
    loss = torch.zeros((), device=classes["cells"].device)
    for name, wanted in classes.items():
        if name == "cells":
            counts = wanted >= 0
            if counts.any():
                loss = loss + F.binary_cross_entropy_with_logits(logits[name][counts], wanted[counts])
        elif (wanted >= 0).any():
            loss = loss + F.cross_entropy(logits[name], wanted)
    return loss
