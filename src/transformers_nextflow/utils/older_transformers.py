"""Differences between versions of transformers that matter here; each part is removed when the range is raised."""

from __future__ import annotations

import functools
import inspect

import torch
from transformers import GenerationMixin, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast


# transformers 5.17 would pass the argument to the template as a variable, and read the tokens as special ones.
SANITIZES_CONTROL_TOKENS = (
    "sanitize_control_tokens" in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)
# In beam search transformers 5.17 assumes that the output has as many classes as the text vocabulary.
BEAM_SEARCH_EXPECTS_TEXT_LOGITS = "vocab_size" in inspect.signature(GenerationMixin._get_top_k_continuations).parameters
# Whether `Trainer` saves a model whose matrices are divided among processes; transformers 5.17 hangs there.
SAVES_TENSOR_PARALLEL = hasattr(PreTrainedModel, "is_distributed_loading_by_transformers")
# What transformers calls the key-value cache in keywords and outputs: `past_key_values` before 5.24.
CACHE_KEYWORD = next(
    name for name in ("cache", "past_key_values") if name in BaseModelOutputWithPast.__dataclass_fields__
)


def accepts_cache_keyword(forward):
    """Lets `forward` accept its `past_key_values` also under the name of the installed transformers.

    Before 5.24 nothing changes: there `cache` is the paged cache of continuous batching, and is passed to the
    attention.
    """
    if CACHE_KEYWORD == "past_key_values":
        return forward

    @functools.wraps(forward)
    def forward_with_cache(*args, **kwargs):
        if CACHE_KEYWORD in kwargs:
            kwargs["past_key_values"] = kwargs.pop(CACHE_KEYWORD)
        return forward(*args, **kwargs)

    # `generate` reads the names of the model's arguments there.
    parameters = inspect.signature(forward).parameters.values()
    forward_with_cache.__signature__ = inspect.Signature(
        [each.replace(name=CACHE_KEYWORD) if each.name == "past_key_values" else each for each in parameters]
    )
    return forward_with_cache


class TextVocabularyLogitsProcessor(LogitsProcessor):
    """Cuts the codes off the scores (B, V): (B, `vocab_size`)."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores[:, : self.vocab_size]
