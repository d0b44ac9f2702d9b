"""The statement of a model of the shapes world about its training (`trained_on` of its config)."""

from __future__ import annotations

from functools import cache

import numpy as np

from ...utils.training_domain import vocabulary_of
from ..conversations import texts_of
from .abilities import ABILITIES, training_case
from .language import plural
from .questions import question_example
from .scene import World
from .suites import DESCRIPTIONS


# The number of cases of each ability from which the words are taken, enough to use all templates.
CASES = 600
# Words, besides the shapes, that are counted.
NOUNS = ("shapes", "objects", "things")
# The worst of 1,000 training images is reconstructed with 25.7 dB, photographs with 6 to 12 dB.
LOWEST_PSNR = 25.0


def trained_on(world: World) -> dict:
    """The statement, as a config holds it."""
    most, lattice = world.max_objects, world.lattice
    return {
        "domain": f"one to {most} flat shapes on a lattice of {lattice} x {lattice} cells, and the words for them",
        "words": list(prompt_words(world)),
        "sizes": [[world.canvas, world.canvas]],
        "most": most,
        "counted": [*map(plural, world.shapes), *NOUNS],
        "lowest_psnr": LOWEST_PSNR,
    }


@cache
def prompt_words(world: World) -> tuple[str, ...]:
    """All words of prompts and answers, numbers left out."""
    rng = np.random.default_rng(0)
    texts = [request for request, _ in DESCRIPTIONS.values()]
    for ability in ABILITIES:
        for _ in range(CASES):
            exchange = training_case(rng, world, ability).exchange
            texts += texts_of(exchange.asked + exchange.answer)
    texts += [question_example(rng, world)[1] for _ in range(CASES)]
    return vocabulary_of(texts)
