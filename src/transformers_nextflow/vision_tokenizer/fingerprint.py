"""How a vision tokenizer is told from others: by what decides which code an image gets."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.offloading import onloaded


# The parts of the tokenizer that decide which code an image gets: in float32, whatever the rest of a model runs in.
CODE_PARTS = ("semantic_encoder", "semantic_projection", "pixel_encoder", "quantizer")
# How features are brought to other grids. Torch's kernels, which came before, round otherwise: of 1,000 images one got
# other codes (`benchmarks/resampling.py`). Nearest and rotary resampling are as they were.
RESAMPLED_BY = {"resampling": "matrices"}
KEPT_RESAMPLINGS = {"nearest", "rotary"}
# Settings of decoders and of training, `use_cache` being set by transformers' `Trainer`; all others may change which
# code an image gets.
NOT_OF_CODES = {
    "pixel_decoder_channels", "pixel_decoder_num_res_blocks", "semantic_decoder_depth", "semantic_decoder_heads",
    "semantic_decoder_hidden_size", "semantic_decoder_hidden_act", "semantic_decoder_positions", "semantic_target_dim",
    "commitment_weight", "initializer_range", "initializer_factor", "attention_dropout", "use_cache",
}  # fmt: skip


@torch.no_grad()
def tokenizer_fingerprint(vq_model: PreTrainedModel) -> str:
    """16 hexadecimal digits that tell tokenizers with different codes apart.

    Of everything that decides which code an image gets: settings, and every bit of the weights in float32. A model in
    half precision keeps these weights in float32, hence the fingerprint; a file in which they were rounded is another
    tokenizer. Decoders may be trained further on frozen codes: they do not count.
    """
    config, tower = vq_model.config, vq_model.config.semantic_config
    settings = _code_settings(config) | {"semantic_config": _code_settings(tower), "tower": tower.model_type}
    resizes_pixels = config.image_size is not None or getattr(tower, "patch_size", None) != config.patch_size
    if resizes_pixels or not {config.downsample, config.upsample} <= KEPT_RESAMPLINGS:
        settings |= RESAMPLED_BY
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with onloaded(vq_model.modules()):
        weights = vq_model.state_dict()
    for name, weight in sorted(weights.items()):
        if name.split(".")[0] in CODE_PARTS:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _code_settings(config: PreTrainedConfig) -> dict:
    """What differs from the defaults, so that settings which a later version adds leave fingerprints as they are."""
    # What transformers notes in every config (its version, the dtype, …) says nothing of codes.
    left_out = NOT_OF_CODES | PreTrainedConfig().to_dict().keys() | config.sub_configs.keys()
    defaults = type(config)().to_dict()
    return {
        name: value for name, value in config.to_dict().items() if name not in left_out and value != defaults.get(name)
    }
