"""Cases: an exchange with the model and the check of its answer.

The same cases are training examples and, if they are held out, evaluation cases: `score` of the right answer is 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...tokenization_nextflow import THINK_PREFIX
from ..conversations import Exchange, Part, images_of, texts_of
from ..held_out import is_reserved
from ..score_tables import Score
from .language import understand
from .requirement import Requirement, check
from .scene import Scene, World


PLAN_BEGIN = ": "  # in a thought, between what is asked for and what will be drawn


@dataclass(frozen=True)
class Case:
    """One exchange of a suite; images are `Scene`s.

    Args:
        kind: which of the ability's categories.
        asked, answer: the exchange; if several answers are right, one of them.
        drawn_from: texts of the answer that say what its image shows; reserved ones are not trained on.
    """

    kind: str
    asked: tuple[Part, ...]
    answer: tuple[Part, ...]
    drawn_from: tuple[str, ...] = ()

    @property
    def exchange(self) -> Exchange:
        return Exchange(self.asked, self.answer)

    @property
    def scenes(self) -> list[Scene]:
        return images_of((*self.asked, *self.answer))

    @property
    def key(self) -> str:
        """What is asked, as one text."""
        return " | ".join(part if isinstance(part, str) else repr(part) for part in self.asked)

    def held_out(self, world: World) -> frozenset[str]:
        """The splits to which it belongs: those of its scenes, and "wording" if its texts are reserved."""
        splits = frozenset().union(*(world.held_out(scene) for scene in self.scenes))
        return splits | {"wording"} if any(map(is_reserved, (self.key, *self.drawn_from))) else splits

    def score(self, output: Sequence[Part], world: World) -> Score:
        """Scores between 0 and 1 of an answer, `right` first; its images as `Scene`s that a judge read."""
        raise NotImplementedError


@dataclass(frozen=True)
class DrawingCase(Case):
    """One image that holds what is required and nothing else, see `requirement.check`.

    For an answer with a thought, `thought` says whether the thought names what is required.
    """

    requirement: Requirement = Requirement(())

    def score(self, output: Sequence[Part], world: World) -> Score:
        score = check(_only(images_of(output)), self.requirement)
        if texts := texts_of(output):
            said = understand(texts[0].removeprefix(THINK_PREFIX).strip().partition(PLAN_BEGIN)[0], world)
            wanted = tuple(sorted((item.concept, item.count) for item in self.requirement.items))
            score["thought"] = float(said.counts == wanted)
        return score


@dataclass(frozen=True)
class SceneCase(Case):
    """One image that is `after`.

    `right`: all of it. `concept`: the right concepts, each as often, whatever their looks; `style`, `looks`: share of
    the stickers with the right style, with all of the right attributes; `place`: everything at its place;
    `background`.
    """

    after: Scene = Scene(())

    def score(self, output: Sequence[Part], world: World) -> Score:
        return compare(_only(images_of(output)), self.after)


def compare(scene: Scene, target: Scene) -> Score:
    """How well a scene agrees with the target; see [`SceneCase`]. The aspect ratio is ignored."""

    def share(attribute) -> float:
        found, wanted = (Counter(map(attribute, one.stickers)) for one in (scene, target))
        return (found & wanted).total() / max(1, found.total(), wanted.total())

    score = {
        "concept": float(share(lambda s: s.concept) == 1),
        "style": share(lambda s: (s.concept, s.style)),
        "looks": share(lambda s: replace(s, cell=(0, 0))),
        "place": float(scene.grid == target.grid and share(lambda s: (s.concept, s.cell)) == 1),
        "background": float(scene.background == target.background),
    }
    return {"right": float(all(value == 1 for value in score.values()))} | score


@dataclass(frozen=True)
class CaptionCase(Case):
    """A caption in any wording. `right`: names all concepts with their numbers, and neither style nor background is
    wrong. `concept`: names all concepts, and no other.
    """

    scene: Scene = Scene(())

    def score(self, output: Sequence[Part], world: World) -> Score:
        said = understand(" ".join(texts_of(output)).strip().lower(), world)
        counts = tuple(sorted(Counter(s.concept for s in self.scene.stickers).items()))
        fits = said.style in (None, self.scene.style) and said.background in (None, self.scene.background)
        named = {concept for concept, _ in said.counts} == set(self.scene.concepts)
        return {"right": float(said.counts == counts and fits), "concept": float(named)}


@dataclass(frozen=True)
class AnswerCase(Case):
    """A text that is one of `answers`, with or without an article."""

    answers: tuple[str, ...] = ()

    def score(self, output: Sequence[Part], world: World) -> Score:
        said = _bare(" ".join(texts_of(output)))
        return {"right": float(said in {_bare(answer) for answer in self.answers})}


@dataclass(frozen=True)
class StoryCase(Case):
    """Images with sentences between them, all of which the prompt tells.

    `right`: as many images as asked for, each as told, and the sentences too. `frames`: share of the images that are as
    told; `told`: the sentences are those of the prompt.
    """

    frames: tuple[Scene, ...] = ()
    sentences: tuple[str, ...] = ()

    def score(self, output: Sequence[Part], world: World) -> Score:
        shown, texts = images_of(output), tuple(text.strip() for text in texts_of(output))
        fits = [compare(a, b)["right"] for a, b in zip(shown, self.frames)]
        share, told = sum(fits) / len(self.frames), float(texts == self.sentences)
        return {"right": float(share == 1 and len(shown) == len(self.frames) and told == 1), "frames": share,
                "told": told}  # fmt: skip


def may_be_trained_on(case: Case, world: World) -> bool:
    """Whether nothing of the case is held out."""
    return not case.held_out(world)


def _only(images: list[Scene]) -> Scene:
    """The image of an answer that must have one; for none or several, an empty scene, for which all scores are zero."""
    return images[0] if len(images) == 1 else Scene((), background="")


def _bare(text: str) -> str:
    text = text.strip().lower().rstrip(".")
    for article in ("a ", "an ", "the "):
        text = text.removeprefix(article)
    return text
