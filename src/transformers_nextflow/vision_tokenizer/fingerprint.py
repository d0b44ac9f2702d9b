"""The fingerprint of a vision tokenizer: a digest of all that decides which code an image gets."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.offloading import onload_weights


# The modules that decide which code an image gets: always in float32, whatever the precision of the rest of the model.
CODE_PARTS = ("semantic_encoder", "semantic_projection", "pixel_encoder", "quantizer")
# The version of the interpolation between grids. Torch's kernels, which were used before, round differently: one image
# in 1,000 got other codes (`benchmarks/resampling.py`). Nearest and rotary resampling have not changed.
RESAMPLED_BY = {"resampling": "matrices"}
KEPT_RESAMPLINGS = {"nearest", "rotary"}
# Settings of decoders and of training, and `use_cache`, which transformers' `Trainer` sets; all other settings may
# change which code an image gets.
NOT_OF_CODES = {
    "pixel_decoder_type", "pixel_decoder_channels", "pixel_decoder_num_res_blocks", "semantic_decoder_depth",
    "semantic_decoder_heads", "semantic_decoder_hidden_size", "semantic_decoder_hidden_act",
    "semantic_decoder_positions", "semantic_target_dim", "commitment_weight", "initializer_range",
    "initializer_factor", "attention_dropout", "use_cache",
}  # fmt: skip
# An encoder of patches has neither; they may be those of a convolutional decoder.
OF_CONVOLUTIONS = {"pixel_channel_multipliers", "pixel_latent_dim"}


@torch.no_grad()
def tokenizer_fingerprint(vq_model: PreTrainedModel) -> str:
    """16 hexadecimal digits that tell tokenizers with different codes apart.

    The digest covers everything that decides which code an image gets: settings, and every bit of the weights in
    float32. A model in half precision keeps these weights in float32, and so its fingerprint; a file in which they were
    rounded is another tokenizer. Decoders do not count, since they may be trained further on frozen codes.
    """
    config, tower = vq_model.config, vq_model.config.semantic_config
    settings = _code_settings(config) | {"semantic_config": _code_settings(tower), "tower": tower.model_type}
    resizes_pixels = config.image_size is not None or getattr(tower, "patch_size", None) != config.patch_size
    if resizes_pixels or not {config.downsample, config.upsample} <= KEPT_RESAMPLINGS:
        settings |= RESAMPLED_BY
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with onload_weights(vq_model.modules()):
        weights = vq_model.state_dict()
    for name, weight in sorted(weights.items()):
        if name.split(".")[0] in CODE_PARTS:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _code_settings(config: PreTrainedConfig) -> dict:
    """The settings that differ from the defaults, so that settings of later versions do not change fingerprints."""
    # Entries that transformers adds to every config (its version, the dtype, …) do not affect codes.
    left_out = NOT_OF_CODES | PreTrainedConfig().to_dict().keys() | config.sub_configs.keys()
    if getattr(config, "pixel_encoder_type", None) == "patch":
        left_out |= OF_CONVOLUTIONS
    defaults = type(config)().to_dict()
    return {
        name: value for name, value in config.to_dict().items() if name not in left_out and value != defaults.get(name)
    }
