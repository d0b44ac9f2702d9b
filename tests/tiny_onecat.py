"""Tiny OneCATs: random ones, and the one of the fixture."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformers_nextflow import (
    OneCatConfig,
    OneCatForConditionalGeneration,
    OneCatImageProcessor,
    OneCatProcessor,
)


LEVELS = [[32, 2], [64, 3]]
# In the order of their ids, from 299 on.
TOKENS = (
    "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<IMG_GEN_CONTEXT>", "<img_gen>", "</img_gen>",
    "<REEF_GEN_CONTEXT>", "<ref_gen>", "</ref_gen>",
)  # fmt: skip
FIRST = 299


def tiny_onecat_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, fillers, and OneCAT's tokens from 299 on, of which some are not special, as in released files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([f"<filler {index}>" for index in range(len(alphabet), FIRST)])
    tokenizer.add_tokens([AddedToken(token, special=token.startswith("<|"), normalized=False) for token in TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")


def tiny_onecat_processor(levels=LEVELS) -> OneCatProcessor:
    return OneCatProcessor(OneCatImageProcessor(levels=levels), tiny_onecat_tokenizer())


def tiny_onecat_config(text_config=None, vq_config=None, **kwargs) -> OneCatConfig:
    """Images of 32x32 and 64x64 pixels (and all ratios) in two and three scales; `vq_config` as values that differ."""
    text = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048, "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    vq = {"channels": 32, "channel_multipliers": [1, 1, 1, 1, 1], "num_res_blocks": 1, "code_bits": 8, "levels": LEVELS}
    values = {
        "text_config": text | (text_config or {}), "vq_config": vq | (vq_config or {}), "reader_hidden_size": 12,
        "reader_image_size": 56, "initializer_range": 0.2, "adapter_rank": 4,
        "image_token_id": FIRST + TOKENS.index("<IMG_CONTEXT>"),
        "reference_token_id": FIRST + TOKENS.index("<REEF_GEN_CONTEXT>"),
    }  # fmt: skip
    return OneCatConfig(**(values | kwargs))


def tiny_onecat_model(seed: int = 0, **kwargs) -> OneCatForConditionalGeneration:
    """A random model in evaluation mode, whose adapters do something; `kwargs` as in `tiny_onecat_config`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OneCatForConditionalGeneration(tiny_onecat_config(**kwargs))
        for name, parameter in model.named_parameters():
            if "adapter_out" in name:
                torch.nn.init.normal_(parameter.data, std=0.2)
    model.generation_config.update(eos_token_id=FIRST + 1, pad_token_id=FIRST + 1)
    return model.eval()
