"""Small random Qwen2.5-VL models as transformers itself saves them, with a tokenizer and a chat template."""

from pathlib import Path

import torch
from tiny import tiny_text_config, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)


# In the form of Qwen2.5-VL's: a system message by default, marks around pictures.
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
    """`tiny_tokenizer` with Qwen's special tokens and without <boi> and <eoi>."""
    text = tiny_tokenizer().backend_tokenizer.to_str().replace("<boi>", "<|vision_start|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text.replace("<eoi>", "<|vision_end|>")),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def save_qwen(
    folder: Path, tied: bool = False, spare_rows: int = 0, max_shard_size: str = "5GB", **text_config
) -> Qwen2_5_VLForConditionalGeneration:
    """Save model, tokenizer, settings and card; `spare_rows` of the vocabulary have no token."""
    tokenizer = qwen_tokenizer()
    vocab_size = len(tokenizer) + spare_rows
    config = Qwen2_5_VLConfig(
        text_config=tiny_text_config(**({"vocab_size": vocab_size} | text_config)),
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return model
