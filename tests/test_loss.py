"""The loss against one cross-entropy after the other; what counts, and with which weight."""

import pytest
import torch
from reference_nextflow import Picture, as_batch, losses, scale_weights
from test_modeling import LEVELS, ragged_batch, random_picture, special_tokens
from tiny import tiny_model

from transformers_nextflow import sequence_layout
from transformers_nextflow.scale_schedule import BASE_GRIDS


def all_labels(inputs):
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def check_loss(model, rows, inputs, labels, image_labels=None):
    """The model's losses equal those of the reference; returns the model's output."""
    logits = model(**inputs).logits
    alpha, vocab_size = model.config.scale_loss_alpha, model.config.text_config.vocab_size
    text, codes = losses(logits.detach(), rows, labels, vocab_size, alpha)
    output = model(**inputs, labels=labels, image_labels=image_labels)
    weighted = [loss * weight for loss, weight, _ in codes]
    assert float(output.loss) == pytest.approx((sum(text) + sum(weighted)) / (len(text) + len(codes)), rel=1e-5)
    for mean, values in ((output.text_loss, text), (output.image_loss, weighted)):
        expected = sum(values) / len(values) if values else float("nan")
        assert float(mean) == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert len(output.scale_losses) == len(model.config.vq_config.scales)
    for scale, mean in enumerate(output.scale_losses.tolist()):
        values = [loss for loss, _, other in codes if other == scale]
        expected = sum(values) / len(values) if values else float("nan")
        assert mean == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert output.logits is None
    return output


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"read_last_scale": True, "vq_config": LEVELS},
        {"accumulate_features": True, "scale_loss_alpha": 0.0},
        {"scale_loss_alpha": 2.0, "tie_word_embeddings": True},
    ],
    ids=["default", "read last", "without weights", "strong weights"],
)
def test_loss_equals_the_reference(options):
    model = tiny_model(**options)
    rows, inputs = ragged_batch(model.config)
    check_loss(model, rows, inputs, all_labels(inputs))


def test_codes_to_write_may_differ_from_the_codes_that_are_read():
    model = tiny_model()
    read, written = random_picture(model.config, seed=1), random_picture(model.config, seed=2)
    picture = Picture(read.grids, read.codes, targets=written.codes)
    rows, inputs = as_batch([[20, picture, 21]], *special_tokens(model.config))
    labels, image_labels = all_labels(inputs), torch.tensor([written.codes])
    corrected = check_loss(model, rows, inputs, labels, image_labels)
    assert float(corrected.image_loss.detach()) != float(model(**inputs, labels=labels).image_loss.detach())


def test_pictures_without_a_label_at_their_end_and_unlabelled_text_do_not_count():
    model = tiny_model()
    rows, inputs = ragged_batch(model.config)
    labels = all_labels(inputs)
    ends = (inputs["input_ids"] == model.config.eoi_token_id).nonzero()
    for b, n in ends[[0, 3]].tolist():
        labels[b, n] = -100
    labels[0, 1:3] = -100
    check_loss(model, rows, inputs, labels)
    # Labels in the slots themselves say nothing.
    slots = inputs["input_ids"] == model.config.image_token_id
    expected = model(**inputs, labels=labels).loss
    assert torch.equal(model(**inputs, labels=labels.masked_fill(slots, -100)).loss, expected)


def test_batches_of_text_alone_and_of_pictures_alone():
    model = tiny_model()
    rows, inputs = as_batch([[20, 21, 22], [23, 24]], *special_tokens(model.config))
    output = check_loss(model, rows, inputs, all_labels(inputs))
    assert torch.isnan(output.image_loss) and torch.isnan(output.scale_losses).all()

    pictures = [random_picture(model.config, base_grid, seed=n) for n, base_grid in enumerate([(16, 16), (8, 32)])]
    rows, inputs = as_batch([[20, picture] for picture in pictures], *special_tokens(model.config))
    labels = torch.where(inputs["input_ids"] == model.config.eoi_token_id, 1, -100)
    output = check_loss(model, rows, inputs, labels)
    assert torch.isnan(output.text_loss)


def test_nothing_to_learn_gives_a_loss_of_zero():
    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    loss.backward()
    assert float(loss.detach()) == 0


def test_loss_is_averaged_over_num_items_in_batch():
    model = tiny_model()
    rows, inputs = ragged_batch(model.config)
    labels = all_labels(inputs)
    count = len([loss for part in losses(model(**inputs).logits.detach(), rows, labels, 320, 0.9) for loss in part])
    mean = model(**inputs, labels=labels).loss
    for items in (2 * count, torch.tensor(2 * count)):
        torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=items).loss, mean / 2)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 2.0])
@pytest.mark.parametrize("base_grid", BASE_GRIDS[::10])
def test_weights_of_scales_equal_the_reference_and_have_mean_one(alpha, base_grid):
    schedule = tiny_model().config.vq_config.scale_schedules.build(base_grid)
    weights = sequence_layout.scale_weights(schedule, alpha)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-5)
    for part, (height, width), weight in zip(
        weights.split(schedule.tokens_per_scale), schedule.grids, scale_weights(list(schedule.grids), alpha)
    ):
        assert part.tolist() == pytest.approx([weight] * (height * width), rel=1e-5)
    if alpha == 0:
        assert torch.equal(weights, torch.ones(schedule.num_tokens))
