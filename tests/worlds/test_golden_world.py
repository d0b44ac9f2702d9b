"""The shapes world says what it said when the bundled checkpoint was trained: its texts are data, not prose."""

import hashlib

import numpy as np

from transformers_nextflow.worlds.shapes import ABILITIES, World, held_out_cases, located_caption, training_case


# Of 40 training cases and 10 held-out ones of each ability, in the order of `ABILITIES`.
DIGESTS = [
    "7a2e7fe13d55",
    "ccef2bbf4051",
    "06c54b832501",
    "1bb4366517cc",
    "6250109453d4",
    "d233711e4bd9",
    "6c72292a0128",
    "7c0cd2f38dcd",
    "367aa88060d9",
    "047a5f774aef",
    "d1a0fe130cba",
]


def digest(number: int, ability: str) -> str:
    world, rng = World(), np.random.default_rng(number)
    cases = [training_case(rng, world, ability) for _ in range(40)] + held_out_cases(ability, world, 10)
    parts = [
        part if isinstance(part, str) else located_caption(part, world)
        for case in cases
        for part in (*case.asked, "->", *case.answer)
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def test_the_world_says_what_it_said_when_its_checkpoint_was_trained():
    assert [digest(number, ability) for number, ability in enumerate(ABILITIES)] == DIGESTS
