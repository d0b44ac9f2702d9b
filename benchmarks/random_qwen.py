"""Makes small random Qwen2.5-VL models as transformers itself saves them, with a tokenizer and a chat template."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from transformers_nextflow import NextFlowVQConfig
from transformers_nextflow.tokenization_nextflow import train_tokenizer


SENTENCES = ["a red circle", "two blue squares and a green star", "how many circles are there? one"]
# It has the form of Qwen2.5-VL's template: a default system message, and marks around images.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nhow many"
    "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if 'image' in content "
    "or content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)
CARD = "---\nlicense: other\nlicense_name: research\nlicense_link: https://example.org/LICENSE\n---\n\n# Small\n"


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of at most 320 tokens, with Qwen's special tokens and without <boi> and <eoi>."""
    text = train_tokenizer(SENTENCES, vocab_size=320).backend_tokenizer.to_str().replace("<boi>", "<|vision_start|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text.replace("<eoi>", "<|vision_end|>")),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def small_config(tied: bool = False, spare_rows: int = 0, **text_config) -> Qwen2_5_VLConfig:
    """Makes a config with two layers of width 32; `spare_rows` of the vocabulary have no token."""
    tokenizer = qwen_tokenizer()
    values = {
        "vocab_size": len(tokenizer) + spare_rows,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # It is larger than usual, so that the output of a random model depends on its context.
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLConfig(
        text_config=values | text_config,
        vision_config=vision_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        tie_word_embeddings=tied,
    )


def save_qwen(
    folder: Path, tied: bool = False, spare_rows: int = 0, max_shard_size: str = "5GB", **text_config
) -> Qwen2_5_VLForConditionalGeneration:
    """Saves model, tokenizer, settings and card."""
    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(small_config(tied, spare_rows, **text_config)).eval()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return model


def small_vq_config() -> NextFlowVQConfig:
    """Makes a tokenizer config for images of 16x16 pixels in four scales, with 32 codes."""
    return NextFlowVQConfig(
        semantic_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        patch_size=4,
        scales=[1, 2, 3, 4],
        codebook_size=32,
        semantic_code_dim=4,
        pixel_code_dim=4,
        pixel_encoder_type="patch",
        pixel_channels=16,
        pixel_decoder_channels=16,
        semantic_decoder_heads=2,
        semantic_decoder_hidden_size=16,
        semantic_target_dim=16,
    )
