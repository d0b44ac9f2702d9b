"""Tiny TokenFlow-t2i models, and a tokenizer that begins texts with a token of its own as Llama's does."""

import torch
from tiny import PATCH_SIZE, SCALES, tiny_tokenizer, tiny_vq_config
from tokenizers.processors import TemplateProcessing

from transformers_nextflow import (
    NextFlowImageProcessor,
    NextFlowVQConfig,
    TokenFlowT2IConfig,
    TokenFlowT2IForConditionalGeneration,
    TokenFlowT2IProcessor,
)


BEGIN = "<|im_start|>"


def tiny_t2i_tokenizer():
    tokenizer = tiny_tokenizer()
    begin = (BEGIN, tokenizer.convert_tokens_to_ids(BEGIN))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    return tokenizer


def tiny_t2i_processor() -> TokenFlowT2IProcessor:
    image_processor = NextFlowImageProcessor(scales=SCALES, patch_size=PATCH_SIZE)
    return TokenFlowT2IProcessor(image_processor, tiny_t2i_tokenizer())


def tiny_t2i_config(text_config=None, vq_config=None, **kwargs) -> TokenFlowT2IConfig:
    """Images of 16x16 pixels in four scales; 32 codes behind 330 other tokens.

    `vq_config` is a whole config, or what differs from `tiny_vq_config`.
    """
    text = {
        "vocab_size": 330 + 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
    }
    values = {
        "text_config": text | (text_config or {}),
        "vq_config": vq_config if isinstance(vq_config, NextFlowVQConfig) else tiny_vq_config(**(vq_config or {})),
        "image_token_start": 330,
        "initializer_range": 0.2,
    }
    return TokenFlowT2IConfig(**(values | kwargs))


def tiny_t2i_model(seed: int = 0, **kwargs) -> TokenFlowT2IForConditionalGeneration:
    """A random model in evaluation mode, whose norms differ from one; `kwargs` as in `tiny_t2i_config`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TokenFlowT2IForConditionalGeneration(tiny_t2i_config(**kwargs))
        for name, parameter in model.language_model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
    return model.eval()
