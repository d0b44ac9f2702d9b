"""What the bundled checkpoint says of its training holds, and no prompt of the training lies outside."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config
from tiny_emoji import tiny_world

from transformers_nextflow.utils.training_domain import TrainingDomain
from transformers_nextflow.utils.typed_values import read_typed
from transformers_nextflow.worlds import emoji
from transformers_nextflow.worlds.emoji import statement as emoji_statement
from transformers_nextflow.worlds.shapes import ABILITIES, World, texts_of, training_case
from transformers_nextflow.worlds.shapes.statement import trained_on


WORLD = World()
BUNDLED = Path(__file__).parents[2] / "checkpoints" / "nextflow-shapes" / "config.json"


@pytest.fixture(scope="module")
def stated() -> TrainingDomain:
    return read_typed(TrainingDomain, json.loads(BUNDLED.read_text())["trained_on"], "trained_on")


def test_the_bundled_checkpoint_says_what_its_world_says():
    assert json.loads(BUNDLED.read_text())["trained_on"] == trained_on(WORLD)


def test_no_prompt_of_the_training_lies_outside(stated):
    rng = np.random.default_rng(1)
    for ability in ABILITIES:
        texts = [text for _ in range(100) for text in texts_of(training_case(rng, WORLD, ability).exchange.asked)]
        assert not stated.unknown_words(texts) and not stated.unseen_counts(texts), ability


def test_no_prompt_of_the_emoji_training_lies_outside():
    abilities, rng = ("drawing", "caption", "question"), np.random.default_rng(1)
    for kinds in ({"single": 1.0}, {"single": 0.5, "count": 0.5}):
        world = replace(tiny_world(), kinds=kinds)
        stated = read_typed(TrainingDomain, emoji_statement.trained_on(world, abilities, 20.0), "trained_on")
        for ability in abilities:
            cases = [emoji.training_case(rng, world, ability) for _ in range(100)]
            texts = [text for case in cases for text in texts_of(case.exchange.asked)]
            assert not stated.unknown_words(texts) and not stated.unseen_counts(texts), ability
        assert bool(stated.unseen_counts(["two dogs"])) == ("count" not in kinds)


@pytest.mark.parametrize(
    ("text", "words", "phrases"),
    [
        ("a photo of a cat", ["cat"], []),
        ("A Red CIRCLE", [], []),
        ("3d stars", ["3d"], []),
        ("five red stars", [], ["five red stars"]),
        ("12 stars and 4 rings", [], ["12 stars"]),
        ("six minus four stars", [], []),
        ("five stars and nine blue circles", [], ["five stars", "nine blue circles"]),
        ("", [], []),
    ],
)
def test_words_and_numbers_outside_are_named(stated, text, words, phrases):
    assert stated.unknown_words([text]) == words and stated.unseen_counts([text]) == phrases


def test_sizes_and_images_outside_are_told(stated):
    assert stated.unseen_sizes([(64, 64), (32, 128)]) == ["32x128"]
    assert stated.is_out_of_domain(12.0) and not stated.is_out_of_domain(26.0)


def test_a_statement_is_typed():
    with pytest.raises(ValueError, match="trained_on: words must be a list of texts or nothing, got 5"):
        tiny_config(trained_on={"domain": "shapes", "words": 5})
    with pytest.raises(ValueError, match="trained_on has no 'word'; did you mean words"):
        tiny_config(trained_on={"domain": "shapes", "word": ["a"]})
    assert tiny_config(trained_on={"domain": "shapes"}).trained_on == {"domain": "shapes"}
