"""Text tokenizers: the special tokens that an image needs, and byte-level BPE for small models."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


PAD_TOKEN = "<|endoftext|>"
EOS_TOKEN = "<|im_end|>"
# The tokenizer's attributes have these names: `tokenizer.boi_token`, `tokenizer.boi_token_id`, …
IMAGE_TOKENS = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<|image_pad|>"}
# The beginning of an answer that reasons in text before it draws (paper, section 6.4).
THINK_PREFIX = "think:"

# Qwen's chat format without its default system message, and with only `<|image_pad|>` for an image, since the
# processor writes `<boi>` and `<eoi>` around it. `generation` marks the answers, on which a model is trained.
CHAT_TEMPLATE = """
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == "image" -%}
                {{- "<|image_pad|>" -}}
            {%- elif part.type == "text" -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception("A content part is of type text or image, got " ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
    {%- if message.role == "assistant" -%}
        {%- generation -%}
            {{- render(message.content) ~ "<|im_end|>" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message.content) ~ "<|im_end|>" -}}
    {%- endif -%}
    {{- "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
""".strip()


def train_tokenizer(texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text can be encoded, and frequent words become one token.

    A word at the start of a text and the same word after a space are two tokens, as in GPT-2 and Qwen.

    Args:
        texts: texts from which the tokens are learnt.
        vocab_size: an upper bound of the number of tokens, special ones included; at least 262. If it is large enough,
            every word of `texts` becomes one token.
        lowercase: read capitals as small letters.

    Raises:
        ValueError: if `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    # The special tokens come first, so their ids do not depend on `texts`.
    special_tokens = [PAD_TOKEN, "<|im_start|>", EOS_TOKEN, *IMAGE_TOKENS.values()]
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}: 256 bytes and the special tokens; got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_roles(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        extra_special_tokens={"im_start_token": "<|im_start|>", **IMAGE_TOKENS},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


def add_image_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the special tokens of images to a tokenizer, such as Qwen2.5-VL's, and set the attributes for them.

    Returns:
        How many of them are new in its vocabulary.
    """
    missing = {name: token for name, token in IMAGE_TOKENS.items() if getattr(tokenizer, name, None) is None}
    # A tokenizer accepts only named tokens that it lists; after loading it lists those of its own file.
    tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *missing]
    return tokenizer.add_special_tokens(missing)


def _with_roles(texts: Iterable[str]) -> Iterable[str]:
    # The words of the chat format occur as often as the texts.
    for text in texts:
        yield text
        yield "user\n"
        yield "assistant\n"
        yield "system\n"
