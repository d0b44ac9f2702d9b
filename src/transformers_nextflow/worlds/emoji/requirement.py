"""Requirements: what a text asks of an image, and how well a scene fulfils it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace

from ..score_tables import Score
from .scene import Scene, Sticker, World


# Ranges of a sticker's middle, (down, right) as shares of the image's sides.
PLACES = {
    "on the left": lambda y, x: x < 0.4,
    "on the right": lambda y, x: x > 0.6,
    "at the top": lambda y, x: y < 0.4,
    "at the bottom": lambda y, x: y > 0.6,
    "in the top left corner": lambda y, x: y < 0.4 and x < 0.4,
    "in the top right corner": lambda y, x: y < 0.4 and x > 0.6,
    "in the bottom left corner": lambda y, x: y > 0.6 and x < 0.4,
    "in the bottom right corner": lambda y, x: y > 0.6 and x > 0.6,
}
# Whether the first middle has the relation to the second.
RELATIONS = {
    "left": lambda a, b: a[1] < b[1] - 0.1,
    "right": lambda a, b: a[1] > b[1] + 0.1,
    "above": lambda a, b: a[0] < b[0] - 0.1,
    "below": lambda a, b: a[0] > b[0] + 0.1,
}


@dataclass(frozen=True)
class Item:
    """`count` stickers of one concept with the attributes that are given; `None` leaves them open.

    `color` "" asks for the colours that it is drawn in, `tone` "" for the default skin tone.
    """

    concept: str
    style: str | None = None
    color: str | None = None
    tone: str | None = None
    turn: str | None = None
    place: str | None = None
    count: int = 1

    @property
    def wanted(self) -> tuple[tuple[str, str], ...]:
        """Names and values of the attributes of a drawing that are asked for."""
        names = ("style", "color", "tone", "turn")
        return tuple((name, getattr(self, name)) for name in names if getattr(self, name) is not None)


def item_of(sticker: Sticker, world: World, **changes) -> Item:
    """A sticker as an item with all attributes except its place."""
    has_colors = bool(world.colors_of(sticker.concept, sticker.style))
    has_tones = bool(world.drawing(sticker.concept, sticker.style).tones)
    item = Item(
        sticker.concept,
        sticker.style,
        sticker.color or ("" if has_colors else None),
        sticker.tone or ("" if has_tones else None),
        sticker.turn,
    )
    return replace(item, **changes)


@dataclass(frozen=True)
class Requirement:
    """Items that an image must hold, and nothing beside them.

    Args:
        items: with different concepts.
        relation: one of `RELATIONS`, where the first lies as seen from the second.
        background: its colour.
        size: "small" or "large": how much of the image a single sticker fills.
    """

    items: tuple[Item, ...]
    relation: str | None = None
    background: str | None = None
    size: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Requirement:
        """The inverse of `to_json`. Raises `ValueError` for anything else."""
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError(f"{text[:80]!r} is not a requirement that `to_json` wrote.")
        return cls(**(values | {"items": tuple(Item(**item) for item in values["items"])}))


def check(scene: Scene, requirement: Requirement) -> Score:
    """Scores between 0 and 1 of a scene.

    `right`: 1 if all other scores are 1. `concept`: share of the items of which there is at least one. `count`: 1 if
    each concept is there exactly as often as required, and no other. If they are required: `style`, `color`, `tone` and
    `turn`, the shares of the stickers that have it; `relation`, `background`, `place` and `size`, 1 or 0.
    """
    groups = [[s for s in scene.stickers if s.concept == item.concept] for item in requirement.items]
    there = [bool(group) for group in groups]
    others = len(scene.stickers) - sum(map(len, groups))
    exact = all(len(group) == item.count for group, item in zip(groups, requirement.items)) and not others
    score = {"concept": sum(there) / len(there), "count": float(exact)}
    shares: dict[str, list[float]] = {}
    for group, item in zip(groups, requirement.items):
        for name, value in item.wanted:
            fits = sum((getattr(sticker, name) or "") == value for sticker in group)
            shares.setdefault(name, []).append(min(1.0, fits / item.count))
        if item.place is not None:
            fits = [PLACES[item.place](*scene.center(sticker)) for sticker in group]
            shares.setdefault("place", []).append(float(bool(fits) and all(fits)))
    score |= {name: sum(values) / len(values) for name, values in shares.items()}
    if requirement.relation is not None:
        first, second = groups[:2]
        holds = RELATIONS[requirement.relation]
        score["relation"] = float(
            bool(first and second) and all(holds(scene.center(a), scene.center(b)) for a in first for b in second)
        )
    if requirement.background is not None:
        score["background"] = float(scene.background == requirement.background)
    if requirement.size is not None:
        score["size"] = float((scene.grid == (1, 1)) == (requirement.size == "large"))
    return {"right": float(all(value == 1 for value in score.values()))} | score
