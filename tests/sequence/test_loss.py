"""The loss against one cross-entropy after the other; what counts, and with which weight."""

import os

import pytest
import torch
from processes import in_two_processes
from reference_nextflow import ReferenceImage, as_batch, losses, scale_weights
from test_modeling import LEVELS, ragged_batch, random_image, special_tokens
from tiny import free_port, tiny_model

from transformers_nextflow.generation.likelihood import log_likelihoods
from transformers_nextflow.scale_schedule import BASE_GRIDS
from transformers_nextflow.sequence import fused_cross_entropy
from transformers_nextflow.sequence import layout as sequence_layout


def all_labels(inputs):
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def check_loss(model, rows, inputs, labels, image_labels=None):
    """The model's losses equal those of the reference; returns the model's output."""
    logits = model(**inputs).logits
    alpha, vocab_size = model.config.scale_loss_alpha, model.config.text_config.vocab_size
    text, codes = losses(logits.detach(), rows, labels, vocab_size, alpha)
    output = model(**inputs, labels=labels, image_labels=image_labels)
    weighted = [loss * weight for loss, weight, _ in codes]
    mean = (sum(text) + sum(weighted)) / (len(text) + len(codes))
    assert float(output.loss.detach()) == pytest.approx(mean, rel=1e-5)
    for mean, values in ((output.text_loss, text), (output.image_loss, weighted)):
        expected = sum(values) / len(values) if values else float("nan")
        assert float(mean.detach()) == pytest.approx(expected, rel=1e-5, nan_ok=True)
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


def test_positions_are_correct_where_their_class_has_the_largest_logit(monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "LOGITS_AT_ONCE", 8 * 5)
    generator = torch.Generator().manual_seed(0)
    hidden_states, text, visual = (torch.randn(n, 4, generator=generator) for n in (8, 11, 6))
    classes = (hidden_states @ torch.cat([text, visual]).T).argmax(-1)
    classes[::2] = (classes[::2] + 1) % 17
    *_, correct = fused_cross_entropy.fused_cross_entropy(hidden_states, [text, visual], classes, torch.ones(8))
    assert correct.tolist() == [False, True] * 4


def test_accuracies_are_told_of_text_and_of_each_scale():
    model = tiny_model()
    model.lm_head.weight.data.zero_()  # so that a code is the most probable class everywhere
    image = random_image(model.config)
    _, inputs = as_batch([[20, image, 21]], *special_tokens(model.config))
    schedule = model.config.vq_config.scale_schedules.build()
    with torch.no_grad():
        logits = model(**inputs).logits[0, 1 : 1 + schedule.num_tokens, model.config.text_config.vocab_size :]
        for scale in range(4):
            codes = logits.argmin(-1)
            own = slice(*schedule.offsets[scale : scale + 2])
            codes[own] = logits.argmax(-1)[own]
            codes[own.start] = logits.argmin(-1)[own.start]
            output = model(**inputs, labels=all_labels(inputs), image_labels=codes[None])
            expected = torch.zeros(4)
            expected[scale] = 1 - 1 / schedule.tokens_per_scale[scale]
            torch.testing.assert_close(output.scale_accuracies, expected)
            assert output.text_accuracy == 0


def test_codes_to_write_may_differ_from_the_codes_that_are_read():
    model = tiny_model()
    read, written = random_image(model.config, seed=1), random_image(model.config, seed=2)
    image = ReferenceImage(read.grids, read.codes, targets=written.codes)
    rows, inputs = as_batch([[20, image, 21]], *special_tokens(model.config))
    labels, image_labels = all_labels(inputs), torch.tensor([written.codes])
    corrected = check_loss(model, rows, inputs, labels, image_labels)
    assert float(corrected.image_loss.detach()) != float(model(**inputs, labels=labels).image_loss.detach())


@pytest.mark.parametrize("as_adapter", [False, True], ids=["fused head", "called head"])
def test_trained_labels_out_of_range_are_refused_with_their_value(as_adapter):
    model = tiny_model()
    if as_adapter:
        model.lm_head.register_forward_hook(lambda *_: None)
    rows, inputs = ragged_batch(model.config)
    labels, codes = all_labels(inputs), inputs["image_tokens"]
    num_texts, num_codes = model.config.text_config.vocab_size, model.config.vq_config.codebook_size
    for label in (num_texts, num_texts + 3, -1, -99):
        wrong = labels.clone()
        wrong[0, 1] = label
        with pytest.raises(ValueError, match=rf"labels of text run from 0 to {num_texts - 1}, got {label};"):
            model(**inputs, labels=wrong)
    for code in (num_codes, -1):
        wrong = codes.clone()
        wrong[0, 2] = code
        with pytest.raises(ValueError, match=rf"codes to predict .* run from 0 to {num_codes - 1}, got {code};"):
            model(**inputs, labels=labels, image_labels=wrong)
        untrained = labels.masked_fill(inputs["input_ids"] == model.config.eoi_token_id, -100)
        assert model(**inputs, labels=untrained, image_labels=wrong).loss.isfinite()


def test_codes_to_predict_are_those_of_the_images():
    model = tiny_model()
    rows, inputs = ragged_batch(model.config)
    labels, codes = all_labels(inputs), inputs["image_tokens"]
    for wrong in (codes[:-1], codes[:, :5]):
        with pytest.raises(ValueError, match=rf"are \({len(wrong)}, {wrong.shape[1]}\), but there are {len(codes)} im"):
            model(**inputs, labels=labels, image_labels=wrong)
    # The slots read no codes of the last scale, so forgotten ones are seen only here.
    padded = inputs | {"image_tokens": codes.clone()}
    padded["image_tokens"][0, model.model.schedules_of(inputs["image_grids"])[0].num_tokens - 1] = -1
    model(**padded)
    with pytest.raises(ValueError, match="got -1;"):
        model(**padded, labels=labels)


def test_images_without_a_label_at_their_end_and_unlabelled_text_do_not_count():
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


def test_batches_of_text_alone_and_of_images_alone():
    model = tiny_model()
    rows, inputs = as_batch([[20, 21, 22], [23, 24]], *special_tokens(model.config))
    output = check_loss(model, rows, inputs, all_labels(inputs))
    assert torch.isnan(output.image_loss) and torch.isnan(output.scale_losses).all()

    images = [random_image(model.config, base_grid, seed=n) for n, base_grid in enumerate([(16, 16), (8, 32)])]
    rows, inputs = as_batch([[20, image] for image in images], *special_tokens(model.config))
    labels = torch.where(inputs["input_ids"] == model.config.eoi_token_id, 1, -100)
    output = check_loss(model, rows, inputs, labels)
    assert torch.isnan(output.text_loss)


def padded_at(inputs: dict, columns: list[int]) -> dict:
    """The one row with pads that stand before these columns."""
    padded = dict(inputs)
    for name, filling in (("input_ids", 7), ("attention_mask", 0)):
        values = inputs[name][0].tolist()
        for column in sorted(columns, reverse=True):
            values.insert(column, filling)
        padded[name] = torch.tensor([values])
    return padded


@pytest.mark.parametrize("columns", [[0], [0, 0, 0], [2], [0, 1, 2, 2], [-1], [0, 2, -1]])
@pytest.mark.parametrize("read_last_scale", [False, True])
@pytest.mark.parametrize("with_image", [False, True])
def test_padding_changes_nothing_wherever_it_stands(with_image, read_last_scale, columns):
    model = tiny_model(read_last_scale=read_last_scale)
    image = random_image(model.config, seed=1)
    row = [20, 21, 22, image, 23, 24] if with_image else [20, 21, 22, 23, 24]
    _, inputs = as_batch([row], *special_tokens(model.config))
    columns = [column % (inputs["input_ids"].shape[1] + 1) for column in columns]
    padded = padded_at(inputs, columns)
    losses = []
    for batch in (inputs, padded, padded | {"labels": padded["input_ids"]}):
        model.zero_grad()
        # Labels of pads say nothing.
        output = model(**({"labels": all_labels(batch)} | batch))
        output.loss.backward()
        losses.append((output.loss.detach(), output.num_trained, model.lm_head.weight.grad.clone()))
    for other in losses[1:]:
        for value, expected in zip(other, losses[0]):
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("read_last_scale", [False, True])
def test_likelihoods_of_padded_rows_are_those_of_single_ones(read_last_scale):
    model = tiny_model(read_last_scale=read_last_scale)
    _, inputs = ragged_batch(model.config)
    found, images = log_likelihoods(model, labels=all_labels(inputs), **inputs), 0
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool())):
        own, ids = slice(images, images + int((ids == model.config.eoi_token_id).sum())), ids[mask][None]
        single = log_likelihoods(
            model, ids, ids, image_tokens=inputs["image_tokens"][own], image_grids=inputs["image_grids"][own]
        )
        images = own.stop
        for name in ("text", "image", "num_text_tokens", "num_image_tokens"):
            torch.testing.assert_close(getattr(found, name)[row], getattr(single, name)[0], atol=1e-4, rtol=1e-5)


def test_an_end_of_an_image_among_the_pads_is_none():
    model = tiny_model()
    _, inputs = as_batch([[20, random_image(model.config, seed=1)]], *special_tokens(model.config))
    expected = model(**inputs, labels=all_labels(inputs)).loss
    padded = padded_at(inputs, [0, 0])
    padded["input_ids"][0, 0] = model.config.eoi_token_id
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    torch.testing.assert_close(model(**padded, labels=labels).loss, expected)


def test_what_follows_on_a_cache_is_trained_without_its_first_token():
    model = tiny_model()
    rows, inputs = as_batch([[20, random_image(model.config, seed=1), 21], [22, 23]], *special_tokens(model.config))
    more = torch.tensor([[24, 25, 26], [27, 28, 29]])
    with torch.no_grad():
        whole = dict(inputs, input_ids=torch.cat([inputs["input_ids"], more], 1))
        whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
        labels = torch.full_like(whole["input_ids"], -100)
        labels[:, -2:] = more[:, 1:]
        expected = model(**whole, labels=labels)
        cache = model(**inputs, use_cache=True).past_key_values
        schedules = model.model.schedules_of(inputs["image_grids"])
        layout = sequence_layout.layout_sequence(whole["input_ids"], whole["attention_mask"], schedules, model.config)
        output = model(
            input_ids=more,
            attention_mask=whole["attention_mask"],
            position_ids=layout.position_ids[..., -3:],
            past_key_values=cache,
            labels=more,
        )
    assert output.num_trained.tolist() == expected.num_trained.tolist() == [4, 0, 0, 0, 0]
    torch.testing.assert_close(output.loss, expected.loss)


def test_the_loss_asks_for_a_mask_that_tells_padding():
    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    labels, mask = all_labels(inputs), inputs.pop("attention_mask")
    for wrong in ({"full_attention": None}, mask[:, None, None].bool()):
        with pytest.raises(ValueError, match=r"The loss needs attention_mask as \(B, past \+ L\)"):
            model(**inputs, labels=labels, attention_mask=wrong)


def test_slots_outside_of_an_image_are_refused():
    model = tiny_model()
    _, inputs = as_batch([[20, random_image(model.config, seed=1)]], *special_tokens(model.config))
    ids = inputs["input_ids"]
    start = int((ids[0] == model.config.boi_token_id).nonzero())
    ids[0, start - 1], ids[0, start + 1] = model.config.image_token_id, 20
    with pytest.raises(ValueError, match="was the text prepared with another size"):
        model(**inputs, labels=ids)


def test_nothing_to_learn_gives_a_loss_of_zero():
    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    loss.backward()
    assert float(loss.detach()) == 0


@pytest.mark.filterwarnings("ignore:A batch has more or fewer labels")  # as is asked for here
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


# The loss fused with the head -----------------------------------------------------------------------------------------


def plain_and_fused(matrices, hidden_states, classes, weights):
    """(sum, each, gradients) by torch's own cross-entropy in one matrix, and fused."""
    for how in ("plain", "fused"):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (hidden_states, *matrices)]
        if how == "plain":
            logits = inputs[0] @ torch.cat(inputs[1:]).T
            losses = torch.nn.functional.cross_entropy(logits.float(), classes, reduction="none")
            total = losses @ weights
        else:
            total, losses, _ = fused_cross_entropy.fused_cross_entropy(inputs[0], inputs[1:], classes, weights)
        (0.5 * total).backward()
        yield total.detach(), losses.detach(), [tensor.grad for tensor in inputs]


def random_targets(count=50, sizes=(40, 23), width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(size, width, generator=generator) for size in sizes]
    hidden_states = torch.randn(count, width, generator=generator)
    classes = torch.randint(sum(sizes), (count,), generator=generator)
    return matrices, hidden_states, classes, torch.rand(count, generator=generator) * 3


@pytest.mark.parametrize("held", [2**24, 50 * 7, 1], ids=["one block a matrix", "ragged blocks", "one class a block"])
def test_the_fused_loss_equals_the_plain_one_in_value_and_gradient(held, monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "LOGITS_AT_ONCE", held)
    (total, each, gradients), (fused_total, fused_each, fused) = plain_and_fused(*random_targets())
    torch.testing.assert_close(fused_total, total, rtol=1e-5, atol=0)
    torch.testing.assert_close(fused_each, each, rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(fused, gradients):
        assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_blocks_that_are_filled_up_to_places_of_a_gpu_change_nothing(monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "logits_at_once", lambda device: (50 * 7, 8))
    widths, blocks = [], fused_cross_entropy._blocks
    monkeypatch.setattr(
        fused_cross_entropy, "_blocks", lambda *args: (widths.append(b[3].shape[1]) or b for b in blocks(*args))
    )
    (total, each, gradients), (fused_total, fused_each, fused) = plain_and_fused(*random_targets())
    assert set(widths) == {8} and len(widths) == 2 * (5 + 3)
    torch.testing.assert_close(fused_total, total, rtol=1e-5, atol=0)
    torch.testing.assert_close(fused_each, each, rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(fused, gradients):
        assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_the_fused_loss_holds_no_more_logits_at_once_than_it_says(monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "LOGITS_AT_ONCE", 50 * 7)
    sizes, blocks = [], fused_cross_entropy._blocks
    monkeypatch.setattr(
        fused_cross_entropy, "_blocks", lambda *args: (sizes.append(b[3].numel()) or b for b in blocks(*args))
    )
    list(plain_and_fused(*random_targets()))
    assert max(sizes) == 50 * 7 and sum(sizes) == 2 * 50 * 63


def test_the_fused_loss_of_extreme_logits_is_finite():
    matrices, hidden_states, classes, weights = random_targets()
    (total, _, gradients), (fused_total, _, fused) = plain_and_fused(matrices, 1e3 * hidden_states, classes, weights)
    torch.testing.assert_close(fused_total, total, rtol=1e-5, atol=0)
    assert all(torch.isfinite(gradient).all() for gradient in fused)
    torch.testing.assert_close(fused[0], gradients[0], rtol=1e-4, atol=1e-4)


def test_the_fused_loss_in_bfloat16_is_as_near_to_float32_as_the_plain_one():
    exact = next(plain_and_fused(*random_targets()))[2]
    matrices, hidden_states, classes, weights = random_targets()
    low = ([m.bfloat16() for m in matrices], hidden_states.bfloat16(), classes, weights)
    plain, fused = ([g.float() for g in result[2]] for result in plain_and_fused(*low))
    for expected, a, b in zip(exact, plain, fused):
        assert float((b - expected).norm()) <= 1.1 * float((a - expected).norm())


def test_the_fused_loss_follows_autocast():
    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    grads = []
    for wrapped in (False, True):
        model.zero_grad()
        if wrapped:  # a hooked head is called, so this is the plain way
            model.lm_head.register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs, labels=all_labels(inputs)).loss
        loss.backward()
        grads.append((loss.detach(), model.lm_head.weight.grad, model.model.language_model.norm.weight.grad))
    for fused, plain in zip(*grads):
        torch.testing.assert_close(fused, plain, rtol=0.02, atol=0.02 * float(plain.abs().max()))
        assert fused.dtype == torch.float32


def test_under_float16_the_gradient_of_a_trained_head_does_not_overflow():
    matrices, hidden_states, _, _ = random_targets(count=256)
    classes, weights = torch.zeros(256, dtype=torch.long), torch.full((256,), 340.0)
    gradients = []
    for half in (False, True):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (4 * hidden_states.abs(), *matrices)]
        with torch.autocast("cpu", torch.float16, enabled=half):
            total = fused_cross_entropy.fused_cross_entropy(inputs[0], inputs[1:], classes, weights)[0]
        (1e-5 * total).backward()
        gradients.append([tensor.grad for tensor in inputs])
    for half, full in zip(gradients[1], gradients[0]):
        assert half.isfinite().all()
        torch.testing.assert_close(half, full)


@pytest.mark.parametrize("kind", ["text", "images", "mixed"])
def test_gradients_of_the_model_are_those_of_the_plain_way(kind):
    model = tiny_model(tie_word_embeddings=True)
    _, inputs = ragged_batch(model.config)
    labels = all_labels(inputs)
    ends = inputs["input_ids"] == model.config.eoi_token_id
    if kind != "mixed":
        labels = labels.masked_fill(ends if kind == "text" else ~ends, -100)

    def gradients():
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    fused = gradients()
    model.lm_head.register_forward_hook(lambda *_: None)
    plain = gradients()
    assert fused.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max() + 1))


class Adapted(torch.nn.Module):
    """A head with a low-rank change, as an adapter makes it."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.linear, self.logits = linear, []
        self.down = torch.nn.Linear(linear.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, linear.out_features, bias=False)

    def forward(self, hidden_states):
        self.logits.append(hidden_states.shape[0])
        return self.linear(hidden_states) + self.up(self.down(hidden_states))


@pytest.mark.parametrize("held", [2**26, 352 * 10, 1], ids=["one block", "ragged blocks", "one position a block"])
def test_a_head_with_an_adapter_is_called_on_few_positions_at_once(held, monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "CALLED_LOGITS_AT_ONCE", held)
    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    labels = all_labels(inputs)
    torch.manual_seed(0)
    model.visual_head = Adapted(model.visual_head)
    output = model(**inputs, labels=labels)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    count, size = int(output.num_trained.sum()), max(1, held // 352)
    # Each block in the forward pass, and again in the backward pass.
    assert max(model.visual_head.logits) == min(size, count) and sum(model.visual_head.logits) == 2 * count

    model.zero_grad()
    adapted = model.visual_head
    model.visual_head = torch.nn.Linear(32, 32, bias=False)
    matrix = adapted.linear.weight + adapted.up.weight @ adapted.down.weight
    model.visual_head.weight = torch.nn.Parameter(matrix.detach())
    expected = model(**inputs, labels=labels)
    expected.loss.backward()
    for name in ("loss", "text_loss", "scale_losses", "text_accuracy", "scale_accuracies"):
        torch.testing.assert_close(output[name], expected[name], atol=1e-6, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and "visual_head" not in name:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)
    dense = model.visual_head.weight.grad
    torch.testing.assert_close(gradients["visual_head.linear.weight"], dense, atol=1e-6, rtol=1e-4)
    by_rank = adapted.up.weight.T @ dense
    torch.testing.assert_close(gradients["visual_head.down.weight"], by_rank, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "visual_head"], "lora_dropout": 0.5},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3]}},
    ],
    ids=["LoRA", "a copy that is trained", "rows that are trained"],
)
def test_heads_that_peft_wraps_hold_few_logits_at_once(options, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(fused_cross_entropy, "CALLED_LOGITS_AT_ONCE", 352 * 10)
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, init_lora_weights=False, **options))
    base = model.get_base_model()
    _, inputs = ragged_batch(base.config)
    labels = all_labels(inputs)
    held, head = [], base.head
    monkeypatch.setattr(base, "head", lambda hidden_states: held.append(len(hidden_states)) or head(hidden_states))

    def step():
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        output = model(**inputs, labels=labels)
        output.loss.backward()
        return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    output, gradients = step()
    assert max(held) == 10
    if not options.get("lora_dropout"):  # in blocks dropout drops others
        monkeypatch.setattr(fused_cross_entropy, "CALLED_LOGITS_AT_ONCE", 2**26)
        at_once, expected = step()
        torch.testing.assert_close(output.loss, at_once.loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_head_that_is_more_than_its_matrix_is_called():
    class Quantized(torch.nn.Linear):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    labels, linear = all_labels(inputs), model.lm_head
    expected = model(**inputs, labels=labels).loss
    model.lm_head = torch.nn.Sequential(linear, torch.nn.Identity())
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    model.lm_head = Quantized(*linear.weight.T.shape, bias=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(linear.weight / 2)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)


def test_a_frozen_head_gets_no_gradient_and_passes_it_on():
    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    model(**inputs, labels=all_labels(inputs)).loss.backward()
    expected = model.model.language_model.norm.weight.grad.clone()
    model.zero_grad()
    model.lm_head.requires_grad_(False)
    model(**inputs, labels=all_labels(inputs)).loss.backward()
    assert model.lm_head.weight.grad is None and model.visual_head.weight.grad is not None
    torch.testing.assert_close(model.model.language_model.norm.weight.grad, expected)


def _sharded_gradients(rank: int, port: int, folder: str):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    fused_cross_entropy.CALLED_LOGITS_AT_ONCE = 352 * 20
    for kind in ("root", "own", "tensor parallel"):
        model = tiny_model()
        heads = [model.lm_head, model.visual_head]
        if kind == "tensor parallel":
            for head in heads:
                parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()))
        else:
            for module in [*model.model.language_model.layers, *(heads if kind == "own" else [])]:
                fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
        _, inputs = ragged_batch(model.config)
        loss = model(**inputs, labels=all_labels(inputs)).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients = {name: g.full_tensor() if hasattr(g, "placements") else g for name, g in gradients.items()}
        if rank == 0:
            torch.save((loss.detach(), gradients), f"{folder}/{kind}.pt")
    torch.distributed.destroy_process_group()


def test_sharded_heads_give_the_same_loss_and_gradients(tmp_path):
    in_two_processes(_sharded_gradients, free_port(), str(tmp_path))
    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    expected = model(**inputs, labels=all_labels(inputs)).loss
    expected.backward()
    for kind in ("root", "own", "tensor parallel"):
        loss, gradients = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        torch.testing.assert_close(loss, expected.detach())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)
