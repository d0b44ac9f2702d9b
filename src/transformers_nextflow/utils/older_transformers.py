"""What NextFlow needs of transformers that versions before 5.23 lack; each part goes when the range is raised."""

from __future__ import annotations

import inspect

import torch
from transformers import GenerationMixin, LogitsProcessor, PreTrainedTokenizerBase


# transformers 5.17 would take the argument for a variable of the template, and read the tokens as its own.
SANITIZES_CONTROL_TOKENS = (
    "sanitize_control_tokens" in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)
# transformers 5.17 takes it in beam search that the output has as many classes as the text vocabulary.
SEARCHES_BEAMS_IN_TEXT_ALONE = "vocab_size" in inspect.signature(GenerationMixin._get_top_k_continuations).parameters


class TextAlone(LogitsProcessor):
    """Cuts the codes off the scores (B, V): (B, `vocab_size`)."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores[:, : self.vocab_size]
