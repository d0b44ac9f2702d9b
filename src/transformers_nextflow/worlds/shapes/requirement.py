"""Requirements: what a text asks of an image, and whether a scene fulfils it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .scene import Object, Scene


RELATIONS = {
    "left": lambda a, b: a.column < b.column,
    "right": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}


@dataclass(frozen=True)
class Item:
    """`count` objects with the given attributes; `None` leaves an attribute free."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    cell: tuple[int, int] | None = None
    count: int = 1

    def matches(self, item: Object) -> bool:
        wanted = (self.shape, self.color, self.size, self.cell)
        return all(want in (None, has) for want, has in zip(wanted, (item.shape, item.color, item.size, item.cell)))


@dataclass(frozen=True)
class Requirement:
    """Items that an image must hold; `relation` of `RELATIONS` says where the first lies as seen from the second."""

    items: tuple[Item, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def num_objects(self) -> int:
        return sum(item.count for item in self.items)


class CheckResult(NamedTuple):
    """`lenient`: all that was asked for is there (GenEval's rule). `strict`: and nothing else is."""

    lenient: bool
    strict: bool


def _assignments(wanted: list[Item], objects: tuple[Object, ...]) -> Iterator[tuple[Object, ...]]:
    """Every way to give each wanted item an object of its own that matches it."""
    if not wanted:
        yield ()
        return
    for i, candidate in enumerate(objects):
        if wanted[0].matches(candidate):
            for rest in _assignments(wanted[1:], objects[:i] + objects[i + 1 :]):
                yield (candidate, *rest)


def check(scene: Scene, requirement: Requirement) -> CheckResult:
    """Whether `scene` holds what was asked.

    Lenient is GenEval's rule: every item is there, with its colour, place and relation; an item asked for in the plural
    is there exactly as often as asked, one in the singular at least once. A background that was asked
    for must be right.
    """
    lenient = (
        requirement.background in (None, scene.background)
        and all(sum(map(i.matches, scene.objects)) == i.count for i in requirement.items if i.count > 1)
        and _holds(scene, requirement)
    )
    return CheckResult(lenient, lenient and len(scene.objects) == requirement.num_objects)


def _holds(scene: Scene, requirement: Requirement) -> bool:
    wanted = [item for item in requirement.items for _ in range(item.count)]
    assignments = _assignments(wanted, scene.objects)
    if requirement.relation is None:
        return next(assignments, None) is not None
    return any(RELATIONS[requirement.relation](found[0], found[1]) for found in assignments)
