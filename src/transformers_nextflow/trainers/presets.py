"""Sizes of models that `init` creates; within a size, settings are chosen to fit the data (`new_model.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from ..scale_schedule import SQUARE_SIDES


@dataclass(frozen=True)
class Preset:
    """A size of model.

    Args:
        purpose: what it is for, in words.
        patch_size: side in pixels of a cell of the finest grid.
        sides: sides of the square grids, of which a level has the first ones.
        levels: resolutions to choose from.
        max_codes, max_words: the largest sizes of the codebook and of the text vocabulary.
        batch_size: rows of a step.
        semantic, pixel, text: settings of the semantic encoder, the tokenizer and the backbone.
    """

    purpose: str
    patch_size: int
    sides: tuple[int, ...]
    levels: tuple[int, ...]
    max_codes: int
    max_words: int
    batch_size: int
    semantic: dict
    pixel: dict
    text: dict


PRESETS = {
    "tiny": Preset(
        purpose="to try the commands, in seconds",
        patch_size=4,
        sides=(1, 2, 3, 4),
        levels=(16,),
        max_codes=64,
        max_words=320,
        batch_size=4,
        semantic={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        pixel={
            "semantic_code_dim": 4, "pixel_code_dim": 4, "pixel_encoder_type": "patch", "pixel_channels": 16,
            "pixel_num_res_blocks": 1, "pixel_latent_dim": 8, "pixel_decoder_channels": 16,
            "pixel_decoder_num_res_blocks": 1, "semantic_decoder_depth": 1, "semantic_decoder_heads": 2,
            "semantic_decoder_hidden_size": 16,
        },
        text={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "small": Preset(
        purpose="two CPU cores",
        patch_size=8,
        sides=(1, 2, 3, 4, 6, 8),
        levels=(32, 64),
        max_codes=1024,
        max_words=2048,
        batch_size=16,
        semantic={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        pixel={
            "semantic_code_dim": 16, "pixel_code_dim": 16, "pixel_encoder_type": "patch", "pixel_channels": 192,
            "pixel_num_res_blocks": 2, "pixel_decoder_channels": 256, "pixel_decoder_num_res_blocks": 3,
            "semantic_decoder_depth": 1, "semantic_decoder_heads": 4, "semantic_decoder_hidden_size": 128,
        },
        text={
            "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
            "num_key_value_heads": 3,
        },
    ),
    "base": Preset(
        purpose="one GPU, and some thousand images at least",
        patch_size=16,
        sides=SQUARE_SIDES[:12],
        levels=(64, 128, 256),
        max_codes=16384,
        max_words=16384,
        batch_size=64,
        semantic={"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6, "num_attention_heads": 6},
        pixel={
            "semantic_code_dim": 32, "pixel_code_dim": 8, "pixel_channels": 64, "pixel_decoder_channels": 96,
            "semantic_decoder_heads": 6, "semantic_decoder_hidden_size": 384,
        },
        text={
            "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
    ),
}  # fmt: skip
