"""The condition of a diffusion decoder: an image's codes, as one vector for each cell (paper, section 2.4)."""

from __future__ import annotations

import hashlib

import torch

from ..configuration_nextflow import NextFlowVQConfig
from ..modeling_nextflow_vq import NextFlowVQModel
from ..scale_schedule import ScaleSchedule
from ..utils.offloading import onload_weights
from ..vision_tokenizer.fingerprint import tokenizer_fingerprint


def condition_channels(config: NextFlowVQConfig) -> int:
    """Channels of `code_condition`."""
    return config.semantic_code_dim + config.pixel_code_dim + config.semantic_target_dim


@torch.no_grad()
def code_condition(vq_model: NextFlowVQModel, image_tokens: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
    """Semantic code vectors, pixel code vectors and the semantic decoder's features, (B, C, h, w) float32.

    Args:
        image_tokens: (B, n) codes of all scales of images of one size, or of the first ones.
    """
    vectors = vq_model.quantizer.decode(image_tokens, schedule)
    features = vq_model.decode_semantics(vectors).permute(0, 3, 1, 2)
    return torch.cat([vectors.float(), features], dim=1)


@torch.no_grad()
def condition_fingerprint(vq_model: NextFlowVQModel) -> str:
    """16 hexadecimal digits that tell tokenizers with different codes or semantic features apart.

    The semantic decoder's weights are rounded to bfloat16 first, so a model in half precision has the same fingerprint.
    """
    digest = hashlib.sha256(tokenizer_fingerprint(vq_model).encode())
    with onload_weights(vq_model.modules()):
        for name, weight in sorted(vq_model.semantic_decoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
