"""Colours of drawings: the ruling colour, and recolouring."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


# Name → hue in degrees. Brown is dark orange and not a hue: it is named, but drawings are never painted in it.
HUES = {"red": 2, "orange": 28, "yellow": 50, "green": 125, "blue": 215, "purple": 280, "pink": 330}
BROWN_BELOW = 0.66  # value below which orange is brown
NEAR = 28  # degrees around the ruling hue that count as it
COLORFUL = 0.25  # saturation and value from which a pixel has a colour
SINGLE, COVERING = 0.85, 0.35  # shares of the coloured, and of all pixels, that have the ruling hue where one rules


class Paint(NamedTuple):
    """The ruling colour of a drawing: its name, and its hue in degrees."""

    name: str
    hue: float


def to_hsv(rgb: np.ndarray) -> np.ndarray:
    """RGB (…, 3) in [0, 1] → hue in degrees, saturation and value in [0, 1], (…, 3)."""
    value, least = rgb.max(-1), rgb.min(-1)
    chroma = value - least
    safe = np.where(chroma > 0, chroma, 1)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    sector = np.select(
        [value == red, value == green], [(green - blue) / safe % 6, (blue - red) / safe + 2], (red - green) / safe + 4
    )
    saturation = np.where(value > 0, chroma / np.where(value > 0, value, 1), 0)
    return np.stack([np.where(chroma > 0, 60 * sector, 0), saturation, value], -1)


def to_rgb(hsv: np.ndarray) -> np.ndarray:
    """The inverse of `to_hsv`."""
    hue, saturation, value = np.moveaxis(hsv, -1, 0)
    offsets = (np.array([5.0, 3.0, 1.0]) + hue[..., None] / 60) % 6
    return value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(offsets, 4 - offsets), 0, 1))


def _distance(a: np.ndarray | float, b: float) -> np.ndarray | float:
    """Degrees between hues."""
    return np.abs((np.asarray(a) - b + 180) % 360 - 180)


def ruling_paint(sprite: np.ndarray) -> Paint | None:
    """The ruling colour of a drawing (H, W, 4) uint8; `None` for drawings of several colours, brown, grey and black."""
    opaque = sprite[..., 3] > 128
    if not opaque.any():
        return None
    hue, saturation, value = np.moveaxis(to_hsv(sprite[opaque][:, :3] / 255.0), -1, 0)
    colorful = (saturation > COLORFUL) & (value > COLORFUL)
    if not colorful.any():
        return None
    weights = (saturation * value)[colorful]
    histogram, edges = np.histogram(hue[colorful], bins=36, range=(0, 360), weights=weights)
    center = float(edges[histogram.argmax()] + 5)
    near = colorful & (_distance(hue, center) <= NEAR)
    if near.sum() < SINGLE * colorful.sum() or near.mean() < COVERING:
        return None
    # The mean over the circle, for hues around red lie on both ends of the scale.
    turn = np.exp(1j * np.deg2rad(hue[near])) @ (saturation * value)[near]
    ruling = float(np.rad2deg(np.angle(turn)) % 360)
    name = min(HUES, key=lambda color: _distance(HUES[color], ruling))
    if name in ("orange", "red", "yellow") and np.median(value[near]) < BROWN_BELOW:
        return None
    return Paint(name, ruling)


def recolor(sprite: np.ndarray, paint: Paint, color: str) -> np.ndarray:
    """A drawing (H, W, 4) uint8 with a ruling colour, painted in another of `HUES`: only pixels of that hue change."""
    hsv = to_hsv(sprite[..., :3] / 255.0)
    ruled = (_distance(hsv[..., 0], paint.hue) <= 2 * NEAR) & (hsv[..., 1] > COLORFUL / 2)
    hsv[..., 0] = np.where(ruled, (hsv[..., 0] + HUES[color] - paint.hue) % 360, hsv[..., 0])
    rgb = np.rint(255 * to_rgb(hsv)).astype(np.uint8)
    return np.concatenate([rgb, sprite[..., 3:]], -1)
