"""The vision tokenizer that codes come from, and how it is told from others."""

from __future__ import annotations

import hashlib
import json
import os

import torch
from transformers import AutoConfig

from ..configuration_nextflow import NextFlowVQConfig
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQModel


# Decoders may be trained further on frozen codes: they do not change what a code is.
DECODERS = ("pixel_decoder.", "semantic_decoder.")
CODE_SETTINGS = (
    "patch_size", "scales", "codebook_size", "semantic_distance_weight", "pixel_distance_weight", "normalize_codes",
    "downsample", "upsample",
)  # fmt: skip


def load_vision_tokenizer(folder: str | os.PathLike) -> NextFlowVQModel:
    """The tokenizer in the folder (or repository) of a tokenizer or of a whole model."""
    if AutoConfig.from_pretrained(folder).model_type == NextFlowVQConfig.model_type:
        return NextFlowVQModel.from_pretrained(folder).eval()
    return NextFlowForConditionalGeneration.from_pretrained(folder).vq_model.eval()


@torch.no_grad()
def tokenizer_fingerprint(vq_model: NextFlowVQModel) -> str:
    """16 hexadecimal digits that tell tokenizers with different codes apart.

    Of everything that decides which code a picture gets. Weights count as bfloat16, so that a tokenizer keeps its
    fingerprint when a model holds it in half precision.
    """
    settings = {name: getattr(vq_model.config, name) for name in CODE_SETTINGS}
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, weight in sorted(vq_model.state_dict().items()):
        if not name.startswith(DECODERS):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
