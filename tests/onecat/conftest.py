"""What tests of OneCAT share."""

import pytest
from test_onecat import quiet
from tiny_onecat import tiny_onecat_model, tiny_onecat_processor

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.conversion.onecat import KEYS


@pytest.fixture(scope="module")
def model():
    return tiny_onecat_model()


@pytest.fixture(scope="module")
def processor():
    return tiny_onecat_processor()


@pytest.fixture(scope="module")
def pipe(model, processor):
    return quiet(NextFlowPipeline(model=model, processor=processor))


@pytest.fixture(scope="module")
def released(model):
    """The weights under released names."""
    return KEYS.inverse({name: w for name, w in model.state_dict().items() if not name.startswith("vq_model.")})
