"""Warnings of our own name the user's line, and what libraries warn of is not asked for."""

import warnings
from pathlib import Path

import pytest
import torch
from test_loras import random_path
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowPipeline
from transformers_nextflow.trainers import NextFlowTrainingArguments


@pytest.fixture
def pipe():
    model = tiny_model()
    model.config.trained_on = {"domain": "shapes", "words": ["two"]}
    return NextFlowPipeline(model, tiny_processor())


def test_a_warning_names_the_line_that_called(pipe):
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        pipe("two red circles")
        pipe.model.generation_config.image_sampling = None
        pipe.model._check_samplings("generation_config")
    assert len(given) == 2 and {warning.filename for warning in given} == {__file__}
    assert "pipe(" in Path(__file__).read_text().splitlines()[given[0].lineno - 1]


def test_types_by_diffusers_name_and_several_adapters_are_taken_without_a_warning(pipe, tmp_path, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    folder = tmp_path / "pipe"
    pipe.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = NextFlowPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.bfloat16)
        model = NextFlowForConditionalGeneration.from_pretrained(
            tmp_path / "pipe" / "model", torch_dtype=torch.bfloat16
        )
        NextFlowTrainingArguments(output_dir=str(tmp_path / "run"))
    assert loaded.model.dtype == model.dtype == torch.bfloat16
    assert not [record for record in caplog.records if "torch_dtype" in record.getMessage()]
    paths = [random_path(tmp_path / name) for name in ("one", "two")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            pipe.load_lora_weights(path, path.name)
        pipe.delete_adapters("two")


def test_nothing_is_pinned_where_there_is_no_accelerator(tmp_path):
    pinned = NextFlowTrainingArguments(output_dir=str(tmp_path)).dataloader_pin_memory
    assert pinned == torch.accelerator.is_available()
