"""Attention of the scales without a mask: equal to the masked one, forward and backward, in training and in drawing."""

import contextlib

import pytest
import torch
from test_generation import draw, mixed_prompts, negative, prompts, schedules_of
from test_modeling import LAYOUTS, ragged_batch
from test_packing import mixed_rows, packed_and_padded
from tiny import tiny_model, tiny_processor

from transformers_nextflow import ImageSampling
from transformers_nextflow.sequence import scale_sdpa
from transformers_nextflow.sequence.scale_sdpa import SCALE_SDPA, plan_attention, plan_cached


CALLS = ["many calls", "one call a sample", "as it costs"]


@pytest.fixture
def cost(monkeypatch):
    """Makes calls for each scale, or one under a mask for each sample, the cheapest."""

    def set_cost(calls: str):
        if calls == "many calls":
            monkeypatch.setattr(scale_sdpa, "CALL_COST", {"cpu": 0})
        elif calls == "one call a sample":
            monkeypatch.setattr(scale_sdpa, "MASKED_COST", 1.0)
            monkeypatch.setattr(scale_sdpa, "CALL_COST", {"cpu": 2**12})

    return set_cost


@contextlib.contextmanager
def masks_seen(monkeypatch):
    """The shapes of all masks that reach the kernel, but for those of text behind an image."""
    plain, shapes = scale_sdpa.sdpa_attention_forward, []

    def seen(module, query, key, value, mask, **kwargs):
        if mask is not None:
            shapes.append(tuple(mask.shape))
        return plain(module, query, key, value, mask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(scale_sdpa, "sdpa_attention_forward", seen)
        yield shapes


def outputs_and_gradients(implementation, batch, valid, options):
    model = tiny_model(**options).train()
    model.set_attn_implementation(implementation)
    logits = model(**batch).logits[valid]
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@LAYOUTS
@pytest.mark.parametrize("calls", CALLS)
def test_padded_rows_have_the_outputs_and_gradients_of_the_masked_ones(options, calls, cost):
    cost(calls)
    batch = ragged_batch(tiny_model(**options).config)[1]
    valid = batch["attention_mask"].bool()
    found, expected = (outputs_and_gradients(name, batch, valid, options) for name in (SCALE_SDPA, "sdpa"))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("calls", CALLS)
def test_packed_rows_have_the_outputs_and_gradients_of_the_masked_ones(calls, cost):
    cost(calls)
    processor = tiny_processor()
    batch, _ = packed_and_padded(processor, mixed_rows(processor), pad_to_multiple_of=64)
    batch.pop("labels")
    valid = batch["seq_idx"] < 4
    found, expected = (outputs_and_gradients(name, batch, valid, {}) for name in (SCALE_SDPA, "sdpa"))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


def test_scales_are_read_without_a_mask(cost, monkeypatch):
    cost("many calls")
    model = tiny_model()
    _, batch = ragged_batch(model.config)
    with masks_seen(monkeypatch) as shapes:
        model(**batch)
    assert not shapes


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 3.0, "guidance_ramp": True}])
def test_prompts_of_unequal_length_are_drawn_without_a_mask(guidance, cost, monkeypatch):
    cost("many calls")
    model = tiny_model()
    inputs = prompts(model.config, mixed_prompts(model.config))
    if guidance:
        inputs |= negative(prompts(model.config, [[], [30, 31], [32]]))
    schedules, sampling = schedules_of(model.config, [(16, 16)] * 3), ImageSampling(top_k=20, **guidance)
    with masks_seen(monkeypatch) as shapes:
        found, logits = draw(model, schedules, inputs, sampling=sampling)
    assert not shapes
    model.set_attn_implementation("sdpa")
    expected, other_logits = draw(model, schedules, inputs, sampling=sampling)
    assert torch.equal(found.image_tokens, expected.image_tokens)
    for row, other in zip(logits, other_logits):
        for scale, reference in zip(row, other):
            torch.testing.assert_close(scale, reference, atol=2e-5, rtol=0)


def test_columns_that_do_not_lie_side_by_side_keep_the_mask():
    config = tiny_model().model.language_model.config
    samples = torch.tensor([[0, -1, 0, 0]])
    assert plan_attention(config, samples, None, 4) is None
    assert plan_attention(config, torch.tensor([[-1, 0, 0, -1]]), None, 4) is not None


def test_short_rows_of_unequal_length_are_read_at_once_and_long_ones_run_by_run():
    config = tiny_model().model.language_model.config
    config.hidden_size = 512
    for columns, is_planned in ((16, False), (8192, True)):
        plan = plan_cached(config, [0, 1, 2, 3], columns // 2, columns, False, torch.device("cpu"))
        assert (plan is not None) == is_planned


def test_a_model_takes_it_unless_another_one_is_asked_for():
    assert tiny_model().model.language_model.config._attn_implementation == SCALE_SDPA
    assert tiny_model(attn_implementation={"text_config": "sdpa"}).config.text_config._attn_implementation == "sdpa"
