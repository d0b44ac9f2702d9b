"""The vision tokenizer that codes come from, and the processor beside it."""

from __future__ import annotations

import os

import torch
from transformers import AutoConfig, AutoProcessor, ProcessorMixin

from ..configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQModel
from ..utils.checkpoint_checks import loading_errors
from ..utils.folder_parts import find_part, load_part


def load_vision_tokenizer(folder: str | os.PathLike) -> NextFlowVQModel:
    """The tokenizer in the folder (or repository) of a tokenizer, a model or a pipeline, in float32."""
    with loading_errors(folder):
        model_type = load_part(AutoConfig, "model", folder).model_type
    if model_type == NextFlowVQConfig.model_type:
        return load_part(NextFlowVQModel, "model", folder, dtype=torch.float32).eval()
    if model_type != NextFlowConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, not a NextFlow or a vision tokenizer.")
    # The rest of a large model would fill the memory in float32.
    return load_part(NextFlowForConditionalGeneration, "model", folder).vq_model.float().eval()


def load_processor(folder: str | os.PathLike) -> ProcessorMixin | None:
    """The processor in the folder (or repository) of a model or a pipeline; a vision tokenizer's has none."""
    with loading_errors(folder):
        place = find_part("processor", folder)
        return None if place is None else AutoProcessor.from_pretrained(place.folder, **place.options)
