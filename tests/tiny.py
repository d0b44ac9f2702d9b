"""Random models so small that a test builds its own in a moment; every test that needs one shares these."""

import socket
from copy import deepcopy
from functools import lru_cache

import torch

from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
    NextFlowVQConfig,
)
from transformers_nextflow.tokenization_nextflow import train_tokenizer


CAPTIONS = ["a red circle", "two blue squares and a green star", "how many circles are there? one"]
SCALES, PATCH_SIZE = (1, 2, 3, 4), 4


@lru_cache
def _trained_tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=320)


def tiny_tokenizer():
    return deepcopy(_trained_tokenizer())


def tiny_processor(scales=SCALES, patch_size=PATCH_SIZE, levels=None, read_last_scale=False) -> NextFlowProcessor:
    image_processor = NextFlowImageProcessor(scales=scales, patch_size=patch_size, levels=levels)
    return NextFlowProcessor(image_processor, tiny_tokenizer(), read_last_scale=read_last_scale)


def tiny_vq_config(**kwargs) -> NextFlowVQConfig:
    """Images of 16x16 pixels (and all ratios), drawn in four scales with 32 codes."""
    values = {
        "semantic_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        "patch_size": PATCH_SIZE,
        "scales": SCALES,
        "codebook_size": 32,
        "semantic_code_dim": 4,
        "pixel_code_dim": 4,
        "pixel_encoder_type": "patch",
        "pixel_channels": 16,
        "pixel_num_res_blocks": 1,
        "pixel_latent_dim": 8,
        "pixel_decoder_channels": 16,
        "pixel_decoder_num_res_blocks": 1,
        "semantic_decoder_depth": 1,
        "semantic_decoder_heads": 2,
        "semantic_decoder_hidden_size": 16,
        "semantic_target_dim": 8,
    }
    return NextFlowVQConfig(**(values | kwargs))


def tiny_text_config(**kwargs) -> dict:
    """A backbone of two layers with grouped keys; its vocabulary is `tiny_tokenizer`'s."""
    values = {
        "vocab_size": len(_trained_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # Larger than usual, so that prompts, codes and positions change what a random model draws.
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "bos_token_id": None,
        "eos_token_id": _trained_tokenizer().eos_token_id,
        "pad_token_id": _trained_tokenizer().pad_token_id,
    }
    return values | kwargs


def tiny_config(text_config=None, vq_config=None, **kwargs) -> NextFlowConfig:
    """`text_config` and `vq_config` are dicts of values that differ; `kwargs` are `NextFlowConfig`'s own."""
    tokenizer = _trained_tokenizer()
    values = {
        "text_config": tiny_text_config(**(text_config or {})),
        "vq_config": tiny_vq_config(**(vq_config or {})),
        "boi_token_id": tokenizer.boi_token_id,
        "eoi_token_id": tokenizer.eoi_token_id,
        "image_token_id": tokenizer.image_token_id,
        "initializer_range": 0.2,
    }
    return NextFlowConfig(**(values | kwargs))


def free_port() -> int:
    """A port for processes of a test to meet at."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


_MODELS: dict[str, NextFlowForConditionalGeneration] = {}


def tiny_model(seed: int = 0, **kwargs) -> NextFlowForConditionalGeneration:
    """A random model in evaluation mode; `kwargs` as in `tiny_config`. It is made once and copied, which is faster."""
    key = repr((seed, kwargs))
    if key not in _MODELS:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            _MODELS[key] = NextFlowForConditionalGeneration(tiny_config(**kwargs)).eval()
    return deepcopy(_MODELS[key])
