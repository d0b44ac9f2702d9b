"""Tables of names: what they hold can be imported, and what they do not hold is refused with what they do."""

import pytest

from transformers_nextflow.evaluation.suites import SUITES


REGISTRIES = [SUITES]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_every_name_stands_for_something(registry):
    assert all(callable(registry[name]) for name in registry) and len(registry) > 0


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_another_name_is_refused_with_those_that_there_are(registry):
    with pytest.raises(ValueError, match=f"There is no {registry.kind} 'cats'; choose one of {', '.join(registry)}"):
        registry["cats"]
