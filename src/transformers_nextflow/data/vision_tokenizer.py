"""Loading of the vision tokenizer that makes codes."""

from __future__ import annotations

import os

import torch
from transformers import AutoConfig

from ..configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQModel
from ..utils.checkpoint_checks import loading_errors


def load_vision_tokenizer(folder: str | os.PathLike) -> NextFlowVQModel:
    """The tokenizer in the folder (or repository) of a tokenizer or of a whole model, in float32."""
    with loading_errors(folder):
        model_type = AutoConfig.from_pretrained(folder).model_type
    if model_type == NextFlowVQConfig.model_type:
        return NextFlowVQModel.from_pretrained(folder, dtype=torch.float32).eval()
    if model_type != NextFlowConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, not a NextFlow or a vision tokenizer.")
    # The rest of a large model would fill the memory in float32.
    return NextFlowForConditionalGeneration.from_pretrained(folder).vq_model.float().eval()
