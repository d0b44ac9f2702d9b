"""A reward by the model itself, from its answers to questions about the image: no other model is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ....generation.likelihood import score_answers
from ....processing_nextflow import NextFlowProcessor
from ....sequence.padding import pad_codes


Ask = Callable[[str], Sequence[tuple[str, str]]]


def ask_for_caption(processor: NextFlowProcessor) -> Ask:
    """A single request, to describe the image, whose right answer is the prompt."""
    return lambda prompt: [(processor.caption_request, prompt)]


def reading_reward(model: nn.Module, processor: NextFlowProcessor, ask: Ask, batch_size: int = 64) -> Callable:
    """The likelihood of the right answers to questions about each image: the mean over its questions of the answer's
    probability per token.

    Args:
        model: the [`NextFlowForConditionalGeneration`] that answers. It may be the model in training; a frozen copy
            (`copy.deepcopy`) cannot learn to agree with its own mistakes.
        ask: a function from a prompt to questions with their answers, at least one.
        batch_size: number of questions in one pass.
    """

    def own_reading(prompts, completions, completion_ids, image_grids, **_) -> list[float]:
        questions = [list(ask(prompt)) for prompt in prompts]
        rows = [row for row, asked in enumerate(questions) for _ in asked]
        flat = [pair for asked in questions for pair in asked]
        parts = []
        for start in range(0, len(flat), batch_size):
            chosen = slice(start, start + batch_size)
            codes = [torch.tensor(completion_ids[row], device=model.device) for row in rows[chosen]]
            texts, answers = zip(*flat[chosen])
            scores = score_answers(
                model,
                processor,
                pad_codes(codes),
                torch.tensor([image_grids[row] for row in rows[chosen]], device=model.device),
                list(texts),
                list(answers),
            )
            parts.append((scores.text / scores.num_text_tokens).exp())
        totals = torch.zeros(len(prompts)).index_add(0, torch.tensor(rows), torch.cat(parts).float().cpu())
        return (totals / torch.tensor([len(asked) for asked in questions])).tolist()

    return own_reading
