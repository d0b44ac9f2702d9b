"""LoRA and QLoRA for NextFlow: which layers are adapted, which rows of new tokens are trained, what is not quantised.

PEFT itself merges, saves, loads and switches adapters; see docs/training.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import BitsAndBytesConfig

from .modeling_nextflow import NextFlowForConditionalGeneration


if TYPE_CHECKING:
    from peft import LoraConfig


# The linear layers of the backbone; of OneCAT's those of all experts. "all-linear" would adapt the vision tokenizer,
# the connector and the heads too: codes would change their meaning.
LORA_TARGETS = r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp(_te|_ue|_ge)?\.(gate|up|down)_proj)"
# Modules that keep the precision in which they are loaded, beside a backbone in four bits.
NOT_QUANTIZED = ["model.vq_model", "model.visual_embedding", "visual_head", "lm_head"]


def lora_config(
    model: NextFlowForConditionalGeneration,
    rank: int = 16,
    new_token_ids: Sequence[int] = (),
    **kwargs,
) -> LoraConfig:
    """The config for `peft.get_peft_model(model, …)`: adapters on the backbone's linear layers.

    Args:
        model: whose vocabulary was extended, if there are `new_token_ids`.
        rank: of the adapters, from 1 to the model's width; their scale is `lora_alpha / rank`, with a `lora_alpha` of
            twice the rank.
        new_token_ids: rows of the vocabulary that are trained whole, in the input embeddings and in the text head.
        kwargs: further fields of `peft.LoraConfig`.

    Raises:
        ValueError: if peft is missing, or for an id outside of the vocabulary or in the place of an image.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("Adapters need peft: pip install transformers-nextflow[peft].") from error
    size, width = model.config.text_config.vocab_size, model.config.text_config.hidden_size
    if not 1 <= rank <= width:
        raise ValueError(f"rank must be from 1 to the model's width of {width}, got {rank}.")
    if outside := [token for token in new_token_ids if not 0 <= token < size]:
        raise ValueError(
            f"new_token_ids {outside} lie outside of the vocabulary of {size}; add them to the tokenizer and call "
            "model.resize_token_embeddings(len(tokenizer)) first."
        )
    for name in ("image_token_id", "reference_token_id"):  # some models do not have them
        if (placeholder := getattr(model.config, name, None)) in new_token_ids:
            raise ValueError(f"{placeholder} stands for slots of images, whose embeddings are not trained.")
    if new_token_ids:
        # If the model ties the two matrices, PEFT ties the rows of the head itself.
        tables = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
        kwargs["trainable_token_indices"] = {table: list(new_token_ids) for table in tables}
    return LoraConfig(**({"r": rank, "lora_alpha": 2 * rank, "target_modules": LORA_TARGETS} | kwargs))


def quantization_config(**kwargs) -> BitsAndBytesConfig:
    """The config for `from_pretrained(quantization_config=…)` for QLoRA: the backbone's layers in four bits (NF4).

    Tokenizer, visual embedding and heads are not quantised, since codes depend on exact distances. Loading needs
    bitsandbytes. `kwargs` are further fields of `BitsAndBytesConfig`.
    """
    values = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": NOT_QUANTIZED}
    return BitsAndBytesConfig(**(values | kwargs))
