"""Whatever comes in is taken rightly, warned of, or refused in a line that names it and the remedy."""

import sys

import bad_input
import checkpoints_and_recipes
import decoders_and_adapters
import files_and_images
import names_and_templates
import pytest
import settings_and_surroundings
import trainings_and_servers
import words_and_calls


MODULES = [
    files_and_images, words_and_calls, checkpoints_and_recipes, settings_and_surroundings, names_and_templates,
    decoders_and_adapters, trainings_and_servers,
]  # fmt: skip
CASES = [case for module in MODULES for case in module.CASES]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return bad_input.make_model(tmp_path_factory.mktemp("tiny"))


SHARED = {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_has_the_outcome_that_is_expected(case, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, told = bad_input.outcome(case, bad_input.Place(tmp_path, model, SHARED))
    assert found == case.expected, told
    assert "Traceback" not in told and "weights_only=False" not in told


def test_the_cases_are_many_and_each_has_its_own_name():
    names = [case.name for case in CASES]
    assert len(names) >= 150 and len(set(names)) == len(names)
    assert sys.getrecursionlimit() == 1000
