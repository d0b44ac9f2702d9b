"""Cases: an exchange with the model and the exact check of its answer.

The same cases are training examples and, if their texts are reserved, evaluation cases: `score` of the right answer is
1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ...tokenization_nextflow import THINK_PREFIX
from ..conversations import Exchange, Part, images_of, texts_of
from ..held_out import is_reserved
from ..score_tables import Score
from .checker import read
from .events import apply_event
from .language import is_full_caption, located_caption, parse_caption, parse_located_caption
from .questions import verdict
from .requirement import Requirement, check
from .scene import Object, Scene, World


# In a thought: between its steps, and between what is to be drawn and where it goes.
THOUGHT_STEP_END, PLAN_BEGIN = "; ", ": "


@dataclass(frozen=True)
class Case:
    """One exchange of a suite; images are `Scene`s.

    Args:
        kind: which of the suite's categories.
        asked, answer: the exchange; if several answers are right, one of them.
        drawn_from: other texts from which an image of the answer could be drawn; reserved ones are not trained on.
    """

    kind: str
    asked: tuple[Part, ...]
    answer: tuple[Part, ...]
    drawn_from: tuple[str, ...] = ()

    @property
    def exchange(self) -> Exchange:
        return Exchange(self.asked, self.answer)

    def key(self, world: World) -> str:
        return key_of(self.asked, world)

    def score(self, output: Sequence[Part], world: World) -> Score:
        """Scores between 0 and 1 of an answer, `right` first; its images as `Scene`s (`read_images`)."""
        raise NotImplementedError


def key_of(asked: Sequence[Part], world: World) -> str:
    """What is asked, as one text: images by what is where in them."""
    return " | ".join(part if isinstance(part, str) else located_caption(part, world) for part in asked)


def may_be_trained_on(case: Case, world: World) -> bool:
    """Whether no text of the case is held out for evaluation."""
    return not any(map(is_reserved, (case.key(world), *case.drawn_from)))


def read_images(parts: Sequence[Part], world: World) -> tuple[Part, ...]:
    """An answer with its images (PIL or (canvas, canvas, 3) uint8) read as scenes."""
    return tuple(read(part, world) if isinstance(part, Image.Image | np.ndarray) else part for part in parts)


def layout(scene: Scene) -> dict[tuple[int, int], Object]:
    """The objects by their cells; offsets from the centres of cells are ignored."""
    return {item.cell: replace(item, offset=(0, 0)) for item in scene.objects}


def same(a: Scene, b: Scene) -> bool:
    """Whether two scenes hold the same objects at the same places before the same background."""
    return a.background == b.background and layout(a) == layout(b)


@dataclass(frozen=True)
class DrawingCase(Case):
    """One image that holds what is required: `right` by GenEval's rule, `strict` if it holds nothing else.

    For an answer with a thought, `thought` says whether the thought states what is required, and `plan` whether the
    places in it make such an image.
    """

    requirement: Requirement = Requirement(())

    def score(self, output: Sequence[Part], world: World) -> Score:
        images, texts = images_of(output), texts_of(output)
        result = check(images[0], self.requirement) if len(images) == 1 else (False, False)
        score = {"right": float(result[0]), "strict": float(result[1])}
        if texts:
            thought, _, plan = texts[0].removeprefix(THINK_PREFIX).strip().partition(PLAN_BEGIN)
            thought = thought.rpartition(THOUGHT_STEP_END)[2]  # the steps before are not scored
            score["thought"] = float(_reads(thought, lambda text: parse_caption(text, world)) == self.requirement)
            planned = _reads(plan, lambda text: parse_located_caption(text, world))
            score["plan"] = float(planned is not None and check(planned, self.requirement).strict)
        return score


@dataclass(frozen=True)
class EditCase(Case):
    """One image that is `after`: `done` in the cells that change from `before`, `preserved` in all the others."""

    before: Scene = Scene(())
    after: Scene = Scene(())

    def score(self, output: Sequence[Part], world: World) -> Score:
        images = images_of(output)
        if len(images) != 1:
            return dict.fromkeys(("right", "done", "preserved"), 0.0)
        image, before, after = layout(images[0]), layout(self.before), layout(self.after)
        changed = {cell for cell in world.cells if before.get(cell) != after.get(cell)}
        fits = {cell: image.get(cell) == after.get(cell) for cell in world.cells}
        ground = images[0].background == self.after.background
        repainted = self.before.background != self.after.background
        done = all(fits[cell] for cell in changed) and (ground or not repainted)
        preserved = all(fits[cell] for cell in world.cells if cell not in changed) and (ground or repainted)
        return {"right": float(done and preserved), "done": float(done), "preserved": float(preserved)}


@dataclass(frozen=True)
class CaptionCase(Case):
    """A caption in any wording that leaves out no object and says nothing false."""

    scene: Scene = Scene(())

    def score(self, output: Sequence[Part], world: World) -> Score:
        asked = _reads(_text(output), lambda text: parse_caption(text, world))
        return {"right": float(asked is not None and check(self.scene, asked).strict)}


@dataclass(frozen=True)
class AnswerCase(Case):
    """A text that ends with the right answer, whatever its steps, or that says the same as a right full caption."""

    def score(self, output: Sequence[Part], world: World) -> Score:
        said, right = (text.rpartition(THOUGHT_STEP_END)[2] for text in (_text(output), self.answer[0]))
        return {"right": float(verdict(said) == verdict(right) or is_full_caption(said, right, world))}


@dataclass(frozen=True)
class StoryCase(Case):
    """Images with sentences between them.

    `right`: the number of images is right, the first is as the prompt describes it, every sentence is true of the
    images around it, and all that the prompt tells is told. `first`, `sentences` (the share that is true) and `told`
    score these.
    """

    opening: Scene = Scene(())
    located: bool = False
    events: tuple[str, ...] | None = None
    num_frames: int = 2

    def score(self, output: Sequence[Part], world: World) -> Score:
        frames, texts = images_of(output), [text.strip() for text in texts_of(output)]
        first = bool(frames) and (
            _alike(frames[0], self.opening) if not self.located else same(frames[0], self.opening)
        )
        true = [is_true_of(text, a, b, world) for text, a, b in zip(texts, frames, frames[1:])]
        told = len(texts) == self.num_frames - 1 and self.events in (None, tuple(texts))
        whole = len(frames) == self.num_frames and len(texts) == self.num_frames - 1
        share = sum(true) / (self.num_frames - 1) if len(true) < self.num_frames else 0.0
        return {
            "right": float(whole and first and all(true) and told),
            "first": float(first),
            "sentences": share,
            "told": float(told),
        }


@dataclass(frozen=True)
class VideoCase(Case):
    """Frames with texts between them, of one object that changes among others that do not.

    `right`: the caption allows every frame, in order. `position`: share of the frames that hold the object within one
    cell of the requested path. `rest`: share of the frames in which nothing else has changed. `texts`: share of the
    texts that are true of the frames around them. A given first frame is not scored.
    """

    frames: tuple[Scene, ...] = ()
    path: tuple[Object, ...] = ()
    first_given: bool = False

    def score(self, output: Sequence[Part], world: World) -> Score:
        shown, texts = images_of(output), [text.strip() for text in texts_of(output)]
        if self.first_given:
            shown = [self.frames[0], *shown]
        skip, count = int(self.first_given), len(self.frames)
        pairs = list(zip(shown, self.frames, self.path))[skip:]
        near = [self._holds(image, item) for image, _, item in pairs]
        rest = [_without(image, self._looks()) == _without(frame, self._looks()) for image, frame, _ in pairs]
        true = [is_true_of(text, a, b, world) for text, a, b in zip(texts, shown, shown[1:])]
        return {
            "right": float(len(shown) == count and self._in_order(shown)),
            "position": sum(near) / (count - skip),
            "rest": sum(rest) / (count - skip),
            "texts": sum(true) / (count - 1),
        }

    def _looks(self) -> set[tuple[str, str]]:
        return {(item.shape, item.color) for item in self.path}

    def _holds(self, image: Scene, item: Object) -> bool:
        return any(
            (other.shape, other.color) in self._looks()
            and max(abs(other.row - item.row), abs(other.column - item.column)) <= 1
            for other in image.objects
        )

    def _in_order(self, shown: Sequence[Scene]) -> bool:
        """The frames that a caption allows: motion is given frame by frame; a colour or a size must change, at any
        time.
        """
        if self.path[0].cell != self.path[-1].cell:
            return all(same(a, b) for a, b in zip(shown, self.frames))
        stages = [frame for i, frame in enumerate(self.frames) if i == 0 or not same(frame, self.frames[i - 1])]
        reached = [next((i for i, stage in enumerate(stages) if same(frame, stage)), -1) for frame in shown]
        return reached[0] == 0 and reached[-1] == len(stages) - 1 and -1 not in reached and reached == sorted(reached)


def is_true_of(sentence: str, before: Scene, after: Scene, world: World) -> bool:
    """Whether a sentence tells what happens between two images."""
    told = _reads(sentence, lambda text: apply_event(text, before, world))
    return told is not None and same(told, after)


def _text(output: Sequence[Part]) -> str:
    return " ".join(texts_of(output)).strip()


def _reads(text: str, reader: Callable):
    try:
        return reader(text)
    except ValueError:
        return None


def _alike(a: Scene, b: Scene) -> bool:
    """Whether two scenes are equal except for the places of objects."""

    def looks(scene: Scene):
        return sorted((item.shape, item.color, item.size) for item in scene.objects)

    return a.background == b.background and looks(a) == looks(b)


def _without(scene: Scene, looks: set[tuple[str, str]]) -> tuple:
    return scene.background, {cell: o for cell, o in layout(scene).items() if (o.shape, o.color) not in looks}
