"""Rows on one key-value cache: rolled back, selected and masked, compared with passes without a cache."""

import pytest
import torch
from tiny import tiny_model

from transformers_nextflow.generation.cached_sequences import CachedSequences, Prompts


@pytest.fixture(scope="module")
def model():
    return tiny_model().model


def read_prompts(model, padded: bool) -> tuple[CachedSequences, list[list[int]]]:
    """Two rows, of different lengths if `padded`."""
    rows = [[20, 21, 22], [23]] if padded else [[20, 21, 22], [23, 24, 25]]
    missing = [3 - len(row) for row in rows]
    sequences = CachedSequences(model)
    ids = torch.tensor([[0] * count + row for count, row in zip(missing, rows)])
    mask = torch.tensor([[0] * count + [1] * len(row) for count, row in zip(missing, rows)])
    sequences.read(Prompts(ids, mask))
    return sequences, rows


def expected_states(model, row: list[int]) -> torch.Tensor:
    return model(torch.tensor([row])).last_hidden_state[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_a_row_that_forgets_goes_on_as_if_it_had_never_read(model, padded):
    sequences, rows = read_prompts(model, padded)
    columns, position = sequences.cache.get_seq_length(), sequences.position
    sequences.read_tokens(torch.tensor([[30, 31], [32, 33]]))
    sequences.roll_back(torch.tensor([False, True]), columns, position)
    found = sequences.read_tokens(torch.tensor([[40, 41], [42, 43]]))[:, -1]
    for row, text in enumerate(([*rows[0], 30, 31, 40, 41], [*rows[1], 42, 43])):
        torch.testing.assert_close(found[row], expected_states(model, text), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kept", [[1, 0], [1], [0, 1, 1]], ids=str)
def test_rows_that_are_kept_go_on_in_their_new_order(model, kept, padded):
    sequences, rows = read_prompts(model, padded)
    sequences.read_tokens(torch.tensor([[30], [0]]), occupied=torch.tensor([[1], [0]]))
    sequences.keep(kept)
    found = sequences.read_tokens(torch.tensor([[40 + place] for place in range(len(kept))]))[:, -1]
    for place, row in enumerate(kept):
        text = [*rows[row], *([30] if row == 0 else []), 40 + place]
        torch.testing.assert_close(found[place], expected_states(model, text), atol=1e-5, rtol=0)
