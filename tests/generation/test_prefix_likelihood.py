"""The likelihood of first scales: the same as drawing's, as the whole pass's, and blind to later scales."""

import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor

from transformers_nextflow import ImageSampling
from transformers_nextflow.generation.cached_sequences import Prompts
from transformers_nextflow.generation.prefix_likelihood import (
    PrefixColumns,
    code_log_probabilities,
    prefix_log_probabilities,
)
from transformers_nextflow.generation.sampling import truncate_logits
from transformers_nextflow.generation.scale_loop import ImageCodes
from transformers_nextflow.generation.sequence_writer import SequenceWriter


TEXTS = ["a red circle", "two blue squares and a green star"]
SIZES = [(16, 16), (28, 8)]
SETTINGS = {
    "plain": ImageSampling(),
    "temperature": ImageSampling(temperature=[0.5, 0.7, 0.9, 1.0]),
    "guided": ImageSampling(guidance_scale=3.0, guidance_ramp=True, temperature=0.8),
    "truncated": ImageSampling(top_k=5, top_p=0.9, temperature=1.2),
    "guided and truncated": ImageSampling(guidance_scale=2.0, image_guidance_scale=1.5, top_k=[3, 4, 5, 6], top_p=0.8),
}


def prompts_of(processor, model, images=None, texts=TEXTS) -> Prompts:
    inputs = processor.apply_image_prompt(texts, images, allow_empty=True)
    codes = None
    if images is not None:
        codes = model.get_image_tokens(inputs["pixel_values"], inputs["image_grids"])
    return Prompts(inputs["input_ids"], inputs["attention_mask"], codes, inputs.get("image_grids"))


def make_images() -> list[list]:
    return [[Image.new("RGB", (16, 16), color)] for color in ("red", "blue")]


def draw(model, processor, sampling: ImageSampling, edits: bool = False, sizes=SIZES):
    """Prompts, contexts, what was drawn, and the guided logits of each scale as the cached loop saw them."""
    images = make_images() if edits else None
    prompts = prompts_of(processor, model, images)
    contexts = []
    if sampling.is_guided(4) or sampling.is_guided(4, "image_guidance_scale"):
        contexts.append(prompts_of(processor, model, images, ["", ""]))
    if sampling.is_guided(4, "image_guidance_scale"):
        contexts.append(prompts_of(processor, model, None, ["", ""]))
    schedules = [model.config.vq_config.scale_schedules.for_size(*size) for size in sizes]
    drawing, seen = ImageCodes(model, schedules, sampling, torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        writer = SequenceWriter(model, prompts, contexts)
        writer.draw(drawing, range(2), lambda _, scale, state: seen.append(state.logits), continues=False)
    return prompts, contexts, drawing, seen


@pytest.mark.parametrize("edits", [False, True], ids=["drawing", "editing"])
@pytest.mark.parametrize("name", SETTINGS)
def test_one_pass_gives_what_the_cached_loop_drew_from(name, edits):
    sampling, model, processor = SETTINGS[name], tiny_model(), tiny_processor()
    prompts, contexts, drawing, seen = draw(model, processor, sampling, edits)
    for num_scales in (1, 3, 4):
        with torch.no_grad():
            found = prefix_log_probabilities(model, prompts, contexts, drawing, num_scales)
        for row, schedule in enumerate(drawing.schedules):
            expected, entropies = [], []
            for scale in range(num_scales):
                options = sampling.drawing_at(scale, 4)
                logits = seen[scale][row, : schedule.tokens_per_scale[scale]] / options.pop("temperature")
                probabilities = truncate_logits(logits, **options).softmax(-1)
                codes = drawing.image_tokens[row, schedule.offsets[scale] : schedule.offsets[scale + 1]]
                expected.append(probabilities[range(len(codes)), codes].log())
                entropies.append(torch.distributions.Categorical(probabilities).entropy())
            own = found.columns.occupied[row]
            torch.testing.assert_close(found.values[row, own], torch.cat(expected), atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(found.entropies[row, own], torch.cat(entropies), atol=2e-5, rtol=1e-4)
            assert (found.values[row, ~own] == 0).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("read_last_scale", [False, True])
def test_the_prefix_alone_gives_the_log_probabilities_of_the_whole_pass(read_last_scale, attention):
    model = tiny_model(read_last_scale=read_last_scale)
    model.set_attn_implementation(attention)
    processor = tiny_processor(read_last_scale=read_last_scale)
    prompts, _, drawing, _ = draw(model, processor, ImageSampling(), sizes=[(16, 16)] * 2)
    ends = processor.image_placeholder_ids(4, 4)[1:]
    whole = torch.cat([prompts.input_ids, torch.tensor([ends, ends])], 1)
    mask = torch.nn.functional.pad(prompts.attention_mask, (0, len(ends)), value=1)
    with torch.no_grad():
        logits = model(
            input_ids=whole,
            attention_mask=mask,
            image_tokens=drawing.image_tokens,
            image_grids=torch.tensor([[4, 4]] * 2),
        ).logits[..., model.config.text_config.vocab_size :]
        start = prompts.input_ids.shape[1] - 1
        expected = logits[:, start : start + 30].log_softmax(-1).gather(-1, drawing.image_tokens[..., None])[..., 0]
        for num_scales, count in ((2, 5), (3, 14), (4, 30)):
            found = prefix_log_probabilities(model, prompts, [], drawing, num_scales)
            torch.testing.assert_close(found.values, expected[:, :count], atol=2e-5, rtol=1e-4)


def test_a_prompt_that_images_share_is_read_once_and_each_gets_what_it_gets_alone():
    model, processor, sampling = tiny_model(), tiny_processor(), ImageSampling(guidance_scale=3.0, temperature=0.8)
    schedules = [model.config.vq_config.scale_schedules.for_size(16, 16)] * 3
    texts, seen, drawn_from = [TEXTS[1], TEXTS[0], TEXTS[1]], [], []
    drawing = ImageCodes(model, schedules, sampling, [torch.Generator().manual_seed(i) for i in range(3)])
    prompts, empty = (prompts_of(processor, model, texts=own) for own in (texts, [""] * 3))
    with torch.no_grad():
        writer = SequenceWriter(model, prompts, [empty])
        writer.draw(drawing, range(3), lambda _, scale, state: drawn_from.append(state.logits), continues=False)

        backbone = model.model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(len(kwargs["inputs_embeds"])), with_kwargs=True
        )
        together = prefix_log_probabilities(model, prompts, [empty], drawing, 3)
        backbone.remove()
        assert seen == [3, 6]  # two prompts and the empty one, then the slots of three images under two contexts
        for row, text in enumerate(texts):
            alone = ImageCodes(model, schedules[:1], sampling, torch.Generator().manual_seed(row))
            own = [prompts_of(processor, model, texts=[part]) for part in (text, "")]
            logits = []
            SequenceWriter(model, own[0], own[1:]).draw(
                alone, range(1), lambda _, scale, state, kept=logits: kept.append(state.logits), continues=False
            )
            for scale, expected in enumerate(logits):
                torch.testing.assert_close(drawn_from[scale][row], expected[0], atol=2e-5, rtol=1e-4)
            expected = prefix_log_probabilities(model, own[0], own[1:], alone, 3)
            torch.testing.assert_close(together.values[row], expected.values[0], atol=2e-5, rtol=1e-4)


def test_nothing_behind_the_prefix_counts_and_gets_no_gradient():
    model, processor = tiny_model(), tiny_processor()
    prompts, _, drawing, _ = draw(model, processor, ImageSampling())
    before = prefix_log_probabilities(model, prompts, [], drawing, 2).values
    before.sum().backward()
    # Rows of scales 3 and 4, which only their own slots read, and the codes of scale 2, which scale 3 reads.
    scale_rows = model.model.visual_embedding.scale.weight.grad
    assert (scale_rows[2] != 0).any() and (scale_rows[3:] == 0).all()
    for row, schedule in enumerate(drawing.schedules):
        drawing.image_tokens[row, schedule.offsets[2] :] = 7
    torch.testing.assert_close(prefix_log_probabilities(model, prompts, [], drawing, 2).values, before)


def test_the_prefix_still_says_how_many_scales_the_image_has():
    model, processor = tiny_model(), tiny_processor()
    prompts, _, drawing, _ = draw(model, processor, ImageSampling())
    with torch.no_grad():
        before = prefix_log_probabilities(model, prompts, [], drawing, 2).values
        drawing._scale_counts -= 2
        assert not torch.allclose(prefix_log_probabilities(model, prompts, [], drawing, 2).values, before)


def test_a_drawn_code_stays_possible_when_truncation_would_exclude_it():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], requires_grad=True)
    value, _ = code_log_probabilities(logits, torch.tensor([3]), top_k=2)
    assert value.item() == pytest.approx(float(torch.tensor([3.0, 2.0, 0.0]).log_softmax(0)[2]))
    value.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 2] == 0


def test_a_scale_that_takes_the_likeliest_code_is_scored_as_the_model_sees_it():
    logits, codes = (
        torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)),
        torch.zeros(2, 5, dtype=torch.long),
    )
    found = code_log_probabilities(logits, codes, temperature=0)
    for value, expected in zip(found, code_log_probabilities(logits, codes)):
        torch.testing.assert_close(value, expected)


def test_columns_place_and_sum_what_belongs_to_codes():
    schedules = [tiny_model().config.vq_config.scale_schedules.for_size(*size) for size in SIZES]
    columns = PrefixColumns.of(schedules, 3, "cpu")
    values = columns.place([torch.arange(1.0, s.num_tokens + 1) for s in schedules])
    for row, schedule in enumerate(schedules):
        counts = schedule.tokens_per_scale[:3]
        assert columns.counts()[row].tolist() == list(counts)
        parts = torch.arange(1.0, schedule.num_tokens + 1).split(schedule.tokens_per_scale)[:3]
        assert columns.sums(values)[row].tolist() == [float(part.sum()) for part in parts]
