"""What NextFlow needs of transformers that versions before 5.23 lack; each part goes when the range is raised."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

import torch
from transformers import GenerationMixin, LogitsProcessor, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from .tokenization_nextflow import CLOSE, OPEN


# transformers 5.17 would take the argument for a variable of the template, and read the tokens as its own.
SANITIZES_CONTROL_TOKENS = (
    "sanitize_control_tokens" in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)
# transformers 5.17 looks for the answers where they stood before pictures took their slots.
MASKS_ANSWERS_BEHIND_PICTURES = hasattr(ProcessorMixin, "_adjust_assistant_masks_indices")
# transformers 5.17 takes it in beam search that the output has as many classes as the text vocabulary.
SEARCHES_BEAMS_IN_TEXT_ALONE = "vocab_size" in inspect.signature(GenerationMixin._get_top_k_continuations).parameters


class TextAlone(LogitsProcessor):
    """Cuts the codes off the scores (B, V): (B, `vocab_size`)."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores[:, : self.vocab_size]


def encode_prompts(tokenizer, prompts: Sequence[str], num_pictures: Sequence[int], chat_template: str) -> list:
    """Token ids of a chat with one user turn for each prompt, up to the start of the answer.

    `num_pictures` placeholders stand before each prompt. Special tokens that a prompt spells out are read as plain
    text.
    """
    encode = _encode_in_library if SANITIZES_CONTROL_TOKENS else encode_piece_by_piece
    chats = [
        [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": prompt}]}]
        for prompt, count in zip(prompts, num_pictures)
    ]
    return encode(tokenizer, chats, chat_template)


def _encode_in_library(tokenizer, chats: list, chat_template: str) -> list[list[int]]:
    return tokenizer.apply_chat_template(
        chats,
        chat_template=chat_template,
        add_generation_prompt=True,
        sanitize_control_tokens=True,
        return_dict=False,
    )


def encode_piece_by_piece(tokenizer, chats: list, chat_template: str) -> list[list[int]]:
    """As `apply_chat_template(..., sanitize_control_tokens=True)` for chats whose contents are lists of parts.

    Special tokens in the parts' texts are marked, and what is marked is encoded by itself.

    Raises:
        ValueError: for text that holds the two noncharacters that mark.
    """
    special_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, longest_first)))

    def marked(part: dict) -> dict:
        if part["type"] != "text":
            return part
        if OPEN in part["text"] or CLOSE in part["text"]:
            raise ValueError(f"The text holds U+FDD0 or U+FDD1, which are no characters: {part['text']!r}.")
        return part | {"text": special.sub(rf"{OPEN}\g<0>{CLOSE}", part["text"])}

    chats = [[turn | {"content": [marked(part) for part in turn["content"]]} for turn in chat] for chat in chats]
    texts = tokenizer.apply_chat_template(
        chats, chat_template=chat_template, add_generation_prompt=True, tokenize=False
    )
    rows = []
    for text in texts:
        # Every second piece is a token that a text spells out.
        pieces = re.split(f"{OPEN}(.*?){CLOSE}", text, flags=re.DOTALL)
        encoded = [
            tokenizer(piece, add_special_tokens=False, split_special_tokens=index % 2 == 1)["input_ids"]
            for index, piece in enumerate(pieces)
        ]
        rows.append([token for ids in encoded for token in ids])
    return rows


def answer_masks(processor, conversations: list, output: dict, **template_kwargs) -> list[list[int]]:
    """Which tokens of a batch of conversations the assistant wrote, its pictures included.

    Args:
        output: the conversations as `apply_chat_template` of the processor encodes them, padded or not.
        template_kwargs: as for `apply_chat_template` of the tokenizer.

    Returns:
        For each row of `output["input_ids"]` 1 at these tokens and 0 elsewhere.
    """
    # Before a placeholder becomes a picture the tokenizer's own masks are right.
    encoded = processor.tokenizer.apply_chat_template(
        conversations, return_dict=True, return_assistant_tokens_mask=True, **template_kwargs
    )
    grids, masks = iter(output.get("image_grids", ())), []
    for ids, answers, occupied in zip(
        encoded["input_ids"], encoded["assistant_masks"], output["attention_mask"], strict=True
    ):
        lengths = [len(processor.picture_tokens(*next(grids))) if i == processor.image_token_id else 1 for i in ids]
        expanded = [answer for answer, length in zip(answers, lengths) for _ in range(length)]
        kept = int(sum(occupied))
        expanded = expanded[:kept] if processor.tokenizer.truncation_side == "right" else expanded[-kept:]
        remaining = iter(expanded)
        masks.append([next(remaining) if present else 0 for present in occupied])
    return masks
