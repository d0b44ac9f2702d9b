"""Reading an image back into the scene that it shows.

Every cell of the lattice is compared with an image of every object that could be in it, so it need not be known which
cells are occupied. The result is exact for true images; in a model's images a blob that looks like no object is
reported with the shape `UNKNOWN`, so that half-drawn objects count as objects.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
from PIL import Image

from .scene import UNKNOWN, Color, Object, Scene, World, object_patch


FOREGROUND = 72.0  # distance in RGB from which a pixel no longer belongs to the background
SPECK = 1 / 32  # share of a cell's pixels below which foreground is noise: a quarter of the thinnest shape
MISFIT = 0.3  # largest squared error that a known object leaves, as a share of its squared contrast to the background


@cache
def _templates(background: str, world: World) -> tuple[list[Object], np.ndarray]:
    """Every object that a cell may hold, and its contrast to the background: (objects, cell * cell * 3) float32."""
    offsets = list(product(range(-world.jitter, world.jitter + 1), repeat=2))
    objects = [
        Object(shape, color, 0, 0, size, offset)
        for (shape, color), size, offset in product(world.all_pairs, world.palette_of_sizes, offsets)
    ]
    patches = [object_patch(o.shape, o.color, o.size, o.offset, background, world) for o in objects]
    contrast = np.stack(patches).astype(np.float32) - np.float32(world.background_palette[background])
    return objects, contrast.reshape(len(objects), -1)


def read_background(image: np.ndarray, world: World) -> str:
    """The name of the background nearest to the median of the image's border."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    median = np.median(border, axis=0)

    def distance(color: Color) -> float:
        return float(np.linalg.norm(median - np.float32(color)))

    return min(world.background_palette, key=lambda name: distance(world.background_palette[name]))


def read(image: np.ndarray | Image.Image, world: World) -> Scene:
    """The scene that an image shows.

    `image` is a PIL image or (canvas, canvas, 3) uint8; another size raises ValueError.
    """
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
    image = np.asarray(image, dtype=np.float32)
    if image.shape != (world.canvas, world.canvas, 3):
        raise ValueError(f"This world's images are {(world.canvas, world.canvas, 3)}, got {image.shape}: resize it.")
    background = read_background(image, world)
    side, cell = world.lattice, world.cell_size
    contrast = image - np.float32(world.background_palette[background])
    cells = contrast.reshape(side, cell, side, cell, 3).swapaxes(1, 2).reshape(side * side, cell * cell, 3)
    foreground = (np.linalg.norm(cells, axis=2) > FOREGROUND).mean(axis=1)

    objects, templates = _templates(background, world)
    found = []
    for index in np.flatnonzero(foreground >= SPECK):
        errors = np.square(templates - cells[index].reshape(1, -1)).sum(axis=1)
        best = int(errors.argmin())
        row, column = world.cells[index]
        item = replace(objects[best], row=row, column=column)
        misfit = errors[best] / np.square(templates[best]).sum()
        found.append(item if misfit <= MISFIT else replace(item, shape=UNKNOWN))
    return Scene(tuple(found), background)
