"""Log-likelihoods of sequences under a model: of their text and of their images' codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..processing_nextflow import NextFlowProcessor
from ..sequence.chat_encoding import encode_text
from ..sequence.loss import IGNORE_INDEX, loss_targets
from ..sequence.padding import padded_rows
from ..utils.evaluation_mode import in_evaluation_mode
from .cached_sequences import CachedSequences, Prompts


@dataclass(frozen=True)
class LogLikelihoods:
    """Sums over the labelled tokens of each row of a batch, (B,) float32 each, and the numbers of these tokens."""

    text: torch.Tensor
    image: torch.Tensor
    num_text_tokens: torch.Tensor
    num_image_tokens: torch.Tensor


@in_evaluation_mode
@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_tokens: torch.Tensor | None = None,
    image_grids: torch.Tensor | None = None,
) -> LogLikelihoods:
    """Log-likelihoods of the tokens that `labels` mark, as in the loss, but with the weight one for every code.

    Args:
        model: a [`NextFlowForConditionalGeneration`].
        input_ids, attention_mask: (B, L).
        labels: (B, L), -100 for tokens that do not count; an image counts if and only if its `<eoi>` has a label.
        image_tokens, image_grids: the images, as in `forward`.

    Raises:
        ValueError: if placeholders, grids and codes do not match.
    """
    layout = model.model.layout_batch(input_ids, attention_mask, image_tokens=image_tokens, image_grids=image_grids)
    hidden_states = model.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        image_tokens=image_tokens,
        layout=layout,
        use_cache=False,
    ).last_hidden_state
    targets = loss_targets(input_ids, labels, image_tokens, layout, layout.schedules, model.config)
    log_probabilities = -model._cross_entropy(hidden_states[targets.mask], targets)[1]
    row = targets.mask.nonzero()[:, 0]
    is_code = targets.scales > 0

    def total(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(input_ids), device=values.device).index_add(0, row, values)

    return LogLikelihoods(
        text=total(log_probabilities * ~is_code),
        image=total(log_probabilities * is_code),
        num_text_tokens=total((~is_code).float()),
        num_image_tokens=total(is_code.float()),
    )


@in_evaluation_mode
@torch.no_grad()
def score_answers(
    model: nn.Module,
    processor: NextFlowProcessor,
    image_tokens: torch.Tensor,
    image_grids: torch.Tensor,
    questions: Sequence[str],
    answers: Sequence[str],
) -> LogLikelihoods:
    """Log-likelihoods of answers (B) to questions about images, the end of the answer included, if the tokenizer has
    a token for it.

    An image that comes with several questions is read once.

    Args:
        image_tokens: (B, N) codes, padded with -1.
        image_grids: (B, 2).

    Raises:
        ValueError: if questions, answers and images differ in number.
    """
    _check_counts(image_grids, questions=questions, answers=answers)
    tokenizer = processor.tokenizer
    starts = processor.prompt_ids(questions, [[grid] for grid in image_grids.tolist()])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = [[*encode_text(tokenizer, answer), *end] for answer in answers]
    sequences, asked = _read_images(model, processor, starts, image_tokens, image_grids, list(map(len, ends)))
    input_ids, occupied = padded_rows(
        [row + end for row, end in zip(asked, ends)], processor.tokenizer.pad_token_id, image_tokens.device
    )
    hidden_states = sequences.read_tokens(input_ids, occupied)
    counts = torch.tensor([len(end) for end in ends], device=image_tokens.device)
    columns = torch.arange(input_ids.shape[1] - 1, device=image_tokens.device)
    counted = columns >= len(columns) - counts[:, None]
    logits = model.head(hidden_states[:, :-1][counted]).float()
    terms = -F.cross_entropy(logits, input_ids[:, 1:][counted], reduction="none")
    text = torch.zeros(len(counts), device=terms.device).index_add(0, counted.nonzero()[:, 0], terms)
    return LogLikelihoods(text, torch.zeros_like(text), counts.float(), torch.zeros_like(text))


def _read_images(
    model: nn.Module,
    processor: NextFlowProcessor,
    starts: Sequence[list[int]],
    image_tokens: torch.Tensor,
    image_grids: torch.Tensor,
    num_answer_tokens: Sequence[int],
) -> tuple[CachedSequences, list[list[int]]]:
    """Rows that have read the prompts `starts`, which begin with an image, up to the image's end; and the rest of each
    prompt, after which the answers follow.
    """
    images = torch.cat([image_grids.to(image_tokens), image_tokens], dim=1)
    distinct, places = images.unique(dim=0, return_inverse=True)
    ends = [start.index(processor.eoi_token_id) + 1 for start in starts]
    heads = {place: start[:end] for place, start, end in zip(places.tolist(), starts, ends)}
    rows = padded_rows(
        [heads[place] for place in range(len(distinct))], processor.tokenizer.pad_token_id, image_tokens.device
    )
    asked = [start[end:] for start, end in zip(starts, ends)]
    following = places.new_tensor([len(ids) + count for ids, count in zip(asked, num_answer_tokens)])
    max_new_positions = following.new_zeros(len(distinct)).scatter_reduce(0, places, following, "amax")
    sequences = CachedSequences(model.model)
    sequences.read(Prompts(*rows, distinct[:, 2:], distinct[:, :2], max_new_positions))
    sequences.keep(places)
    return sequences, asked


@torch.no_grad()
def score_images(
    model: nn.Module,
    processor: NextFlowProcessor,
    image_tokens: torch.Tensor,
    image_grids: torch.Tensor,
    prompts: Sequence[str],
) -> LogLikelihoods:
    """Log-likelihoods of images (B) drawn from prompts; arguments as in `score_answers`."""
    _check_counts(image_grids, prompts=prompts)
    ends = [processor.image_placeholder_ids(*grid) for grid in image_grids.tolist()]
    return _score(model, processor, processor.prompt_ids(prompts), ends, image_tokens, image_grids)


def _score(model, processor, starts, ends, image_tokens, image_grids) -> LogLikelihoods:
    """The log-likelihoods of `ends` after `starts`, both rows of token ids."""
    rows = [start + end for start, end in zip(starts, ends)]
    input_ids, attention_mask = padded_rows(rows, processor.tokenizer.pad_token_id, image_tokens.device)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, end in enumerate(ends):
        labels[row, -len(end) :] = input_ids[row, -len(end) :]
    return log_likelihoods(model, input_ids, labels, attention_mask, image_tokens, image_grids)


def _check_counts(image_grids: torch.Tensor, **texts: Sequence[str]):
    for name, values in texts.items():
        if len(values) != len(image_grids):
            raise ValueError(f"{len(values)} {name} came with {len(image_grids)} images; give one for each.")
