"""Text and images in turn on one cache, against passes over the whole sequence without one."""

import warnings
from dataclasses import replace
from threading import Thread

import pytest
import torch
from reference_nextflow import ReferenceImage, as_batch
from test_generation import negative, prompts, schedules_of, teacher_forced_logits
from test_modeling import ATTENTIONS, LEVELS, attention, random_image, special_tokens
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from transformers_nextflow import ImageSampling, InterleavedStreamer, ScaleState
from transformers_nextflow.generation.cached_sequences import Prompts
from transformers_nextflow.generation.scale_loop import ImageCodes
from transformers_nextflow.generation.sequence_writer import SequenceWriter


GREEDY = ImageSampling(temperature=0)


def talkative_model(**kwargs):
    """A random model that opens an image now and then."""
    model = tiny_model(**kwargs)
    config = model.config
    model.lm_head.weight.data[config.boi_token_id] *= 4
    model.generation_config = GenerationConfig(eos_token_id=config.text_config.eos_token_id)
    return model


def rows_of(config):
    return [
        [20, random_image(config, seed=1), 21, 22],
        [23, 24, config.boi_token_id],
        [random_image(config, (8, 32), seed=2), random_image(config, (20, 12), seed=3), 25],
    ]


def batch_of(config, rows):
    return as_batch(rows, *special_tokens(config))[1]


def interleaved_by_full_passes(model, row, max_new_tokens, max_images, negatives=None, **kwargs):
    """What one row becomes, token by token and image by image, each from a pass over everything so far."""
    config, row, written, drawn = model.config, list(row), 0, 0
    while True:
        if row[-1] == config.boi_token_id:
            inputs = batch_of(config, [row])
            grids = [item.grids[-1] for item in row if isinstance(item, ReferenceImage)] or [(4, 4)]
            size = (grids[-1][0] * 4, grids[-1][1] * 4)
            if negatives is not None:
                inputs |= negative(prompts(config, [negatives]))
            output = model.generate_images(**inputs, image_sizes=[size], **kwargs)
            grid = output.image_grids[0].tolist()
            schedule = model.model.schedules_of(torch.tensor([grid]))[0]
            row[-1] = ReferenceImage(list(schedule.grids), output.image_tokens[0].tolist())
            drawn += 1
            continue
        if written == max_new_tokens or (written and row[-1] == config.text_config.eos_token_id):
            return row
        with torch.no_grad():
            logits = model(**batch_of(config, [row])).logits[0, -1, : config.text_config.vocab_size].clone()
        logits[[config.eoi_token_id, config.image_token_id]] = -torch.inf
        if drawn == max_images:
            logits[config.boi_token_id] = -torch.inf
        row.append(int(logits.argmax()))
        written += row[-1] != config.boi_token_id


def assert_rows_equal(config, output, expected):
    inputs = batch_of(config, expected)
    for name, value in inputs.items():
        found = getattr(output, name)
        assert torch.equal(found[:, : value.shape[1]], value), name


@pytest.mark.parametrize("implementation", ATTENTIONS)
@pytest.mark.parametrize("read_last_scale", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_interleaved_batch_equals_rows_by_full_passes(implementation, read_last_scale, guided):
    model = talkative_model(read_last_scale=read_last_scale)
    model.set_attn_implementation(implementation)
    config, rows, sampling, options = model.config, rows_of(model.config), GREEDY, {}
    if guided:
        sampling = replace(GREEDY, guidance_scale=3.0, num_unguided_scales=1)
        options = negative(prompts(config, [[30, 31], [], [32]]))
    with attention(implementation):
        output = model.generate_interleaved(
            **batch_of(config, rows), **options, sampling=sampling, max_new_tokens=8, max_images=2, do_sample=False
        )
        expected = [
            interleaved_by_full_passes(model, row, 8, 2, negatives if guided else None, sampling=sampling)
            for row, negatives in zip(rows, [[30, 31], [], [32]])
        ]
    assert sum(isinstance(item, ReferenceImage) for row in expected for item in row) >= 3 + 3
    assert_rows_equal(config, output, expected)


@pytest.mark.parametrize("options", [{}, {"read_last_scale": True}, {"vq_config": LEVELS, "read_last_scale": True}])
def test_logits_on_one_cache_equal_one_teacher_forced_pass(options):
    """Text, image, text, image, with rows that sit out, under guidance."""
    model = tiny_model(**options)
    config, boi = model.config, model.config.boi_token_id
    schedules = schedules_of(config, [(16, 16), (8, 32), (20, 12)], [16, 8, 16] if "vq_config" in options else None)
    start = [[20, random_image(config, seed=1)], [21], [22, 23]]
    sampling = ImageSampling(guidance_scale=2.0)
    with torch.no_grad():
        context = Prompts(**prompts(config, [[30], [31, 32], []]))
        writer = SequenceWriter(model, Prompts(**batch_of(config, start)), [context])
        seen, drawn = [], []

        def draw(rows, seed):
            drawing = ImageCodes(model, [schedules[row] for row in rows], sampling, torch.Generator().manual_seed(seed))
            logits = [[] for _ in rows]

            def record(_, scale, state):
                for index, schedule in enumerate(drawing.schedules):
                    if scale < schedule.num_scales:
                        logits[index].append(state.logits[index, : schedule.tokens_per_scale[scale]])

            writer.draw(drawing, rows, record)
            drawn.extend((row, torch.cat(part)) for row, part in zip(rows, logits))

        def look():
            seen.append(([len(ids) for ids in writer.tokens], writer.text_logits))

        look()
        writer.append([[40, boi], [41, 42, 43, boi], []])
        draw([0, 1], seed=0)
        look()
        writer.append([[], [44, boi], [45, 46]])
        look()
        draw([1], seed=1)
        writer.append([[47, 48], [49], [boi]])
        draw([2], seed=2)
        look()

        finished = writer.finished()
        whole = model(**vars(finished)).logits
        longest = finished.input_ids.shape[1]
        for lengths, logits in seen:
            for row, length in enumerate(lengths):
                column = longest - len(writer.tokens[row]) + length - 1
                expected = whole[row, column, : config.text_config.vocab_size]
                torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)
        history = {0: start[0] + [40], 1: [21, 41, 42, 43], 2: [22, 23, 45, 46]}
        contexts = {0: [30], 1: [31, 32], 2: []}
        numbers = {0: [1], 1: [0, 1], 2: [0]}
        for row, logits in drawn:
            number = numbers[row].pop(0)
            codes = writer.image_tokens[row][number]
            before, after = (
                teacher_forced_logits(model, [part], [schedules[row]], codes[None])[0]
                for part in (history[row], contexts[row])
            )
            torch.testing.assert_close(logits, 2 * before - after, atol=1e-4, rtol=0)
            history[row] = [*history[row], ReferenceImage(list(schedules[row].grids), codes.tolist()), 44]


@pytest.mark.parametrize("min_images", [0, 2])
def test_a_row_depends_on_its_own_seed_and_not_on_its_batch(min_images):
    model = talkative_model()
    rows = rows_of(model.config)
    options = {"max_new_tokens": 12, "max_images": 2, "do_sample": True, "sampling": ImageSampling()}
    options["min_images"] = min_images

    def run(order):
        generator = [torch.Generator().manual_seed(n) for n in order]
        inputs = batch_of(model.config, [rows[n] for n in order])
        return model.generate_interleaved(**inputs, generator=generator, **options)

    def row_of(output, row):
        keep = output.attention_mask[row].bool()
        drawn = [output.image_tokens[piece.image] for piece in output.segments[row] if piece.image is not None]
        return output.input_ids[row, keep].tolist(), [codes[codes >= 0].tolist() for codes in drawn]

    together = run([2, 0, 1])
    for place, n in enumerate([2, 0, 1]):
        assert row_of(run([n]), 0) == row_of(together, place)


def test_segments_tell_text_from_images_in_order():
    model = talkative_model()
    config, rows = model.config, rows_of(model.config)
    output = model.generate_interleaved(
        **batch_of(config, rows), sampling=GREEDY, max_new_tokens=8, max_images=2, do_sample=False
    )
    schedules = model.model.schedules_of(output.image_grids)
    for row, pieces in enumerate(output.segments):
        prompt_length = len(as_batch([rows[row]], *special_tokens(config))[0][0])
        first = output.attention_mask[row].argmax() + prompt_length - int(row == 1)
        edges = [int(first)] + [piece.stop for piece in pieces]
        assert [(piece.start, piece.stop) for piece in pieces] == list(zip(edges, edges[1:]))
        assert edges[-1] == output.input_ids.shape[1]
        for piece in pieces:
            ids = output.input_ids[row, piece.start : piece.stop].tolist()
            if piece.image is None:
                assert not {config.boi_token_id, config.eoi_token_id, config.image_token_id} & set(ids)
            else:
                slots = schedules[piece.image].num_slots()
                assert ids == [config.boi_token_id] + [config.image_token_id] * slots + [config.eoi_token_id]
    assert [piece.image for piece in output.segments[1] if piece.image is not None][0] == 1 + (
        sum(piece.image is not None for piece in output.segments[0])
    )


def test_finished_sequences_go_on_as_a_prompt():
    model = talkative_model()
    inputs = batch_of(model.config, rows_of(model.config))
    options = {"sampling": GREEDY, "do_sample": False, "max_images": 2, "eos_token_id": -1}
    whole = model.generate_interleaved(**inputs, **options, max_new_tokens=6)
    half = model.generate_interleaved(**inputs, **options, max_new_tokens=3)
    drawn = [sum(piece.image is not None for piece in pieces) for pieces in half.segments]
    counts = (half.input_ids == model.config.eoi_token_id).sum(1).tolist()
    images = zip(half.image_tokens.split(counts), half.image_grids.split(counts))
    for row, (tokens, grids) in enumerate(images):
        rest = model.generate_interleaved(
            half.input_ids[[row]],
            half.attention_mask[[row]],
            image_tokens=tokens,
            image_grids=grids,
            **options | {"max_images": 2 - drawn[row]},
            max_new_tokens=3,
        )
        assert_same_row(rest, 0, whole, row)


def assert_same_row(output, row, other, other_row):
    rows = [out.input_ids[n][out.attention_mask[n].bool()] for out, n in ((output, row), (other, other_row))]
    assert torch.equal(*rows)


def test_limits_force_text_or_images():
    model = talkative_model()
    config = model.config
    inputs = batch_of(config, [[20, 21], [22]])
    written = model.generate_interleaved(**inputs, max_images=0, max_new_tokens=30, do_sample=False, eos_token_id=-1)
    assert written.image_tokens is None and all(len(pieces) == 1 for pieces in written.segments)
    plain = model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(written.input_ids[:, -30:], plain[:, length:])
    drawn = model.generate_interleaved(
        **inputs, min_images=2, max_images=2, max_new_tokens=0, sampling=GREEDY, image_sizes=[(16, 16), (8, 32)]
    )
    assert [[piece.image for piece in pieces] for pieces in drawn.segments] == [[0, 1], [2, 3]]
    assert drawn.image_grids.tolist() == [[4, 4], [4, 4], [2, 8], [2, 8]]


def test_a_row_that_would_end_draws_first_what_it_has_to():
    model = tiny_model()
    model.lm_head.weight.data[model.config.boi_token_id] *= 0
    inputs = batch_of(model.config, [[20, 21], [22]])
    options = {"sampling": GREEDY, "do_sample": False, "max_images": 1}
    free = model.generate_interleaved(**inputs, **options, max_new_tokens=6)
    assert free.image_tokens is None
    first = int(free.input_ids[0, free.segments[0][0].start])
    forced = model.generate_interleaved(**inputs, **options, max_new_tokens=6, min_images=1, eos_token_id=first)
    assert [len([p for p in pieces if p.image is not None]) for pieces in forced.segments] == [1, 1]
    (before, image) = forced.segments[0][:2]
    # The end of turn, its first choice, was no choice before the image.
    assert first not in forced.input_ids[0, before.start : before.stop].tolist() and image.image == 0


@pytest.mark.parametrize("min_images", [1, 2])
def test_a_row_that_a_stop_string_ends_draws_what_it_has_to_and_no_more(min_images):
    model, tokenizer, seen = tiny_model(), tiny_tokenizer(), []
    inputs = batch_of(model.config, [[20, 21], [22]])
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": -1, "sampling": GREEDY, "tokenizer": tokenizer}
    free = model.generate_interleaved(**inputs, **options, max_images=0)
    options["stop_strings"] = [tokenizer.decode(free.input_ids[0, -18:-16])]
    limits = {"min_images": min_images, "max_images": 2}
    output = model.generate_interleaved(
        **inputs, **options, **limits, callback=lambda *_: seen.append(None) or len(seen) < 40
    )
    for pieces in output.segments:
        assert sum(piece.image is not None for piece in pieces) == min_images
    assert output.finish_reasons[0] == "stop" and free.finish_reasons == ["length"] * 2
    # The first row stopped early, and ends with its images.
    first = output.segments[0]
    assert sum(piece.stop - piece.start for piece in first if piece.image is None) < 20
    assert [piece.image is None for piece in first] == [True] + [False] * min_images


def test_a_callback_can_end_all_rows():
    model = tiny_model()
    inputs = batch_of(model.config, [[20, 21], [22]])
    output = model.generate_interleaved(
        **inputs, min_images=1, max_new_tokens=0, sampling=GREEDY, callback=lambda model, scale, state: scale < 1
    )
    assert (output.image_tokens >= 0).sum(1).tolist() == [5, 5]
    assert output.finish_reasons == ["interrupted"] * 2


@pytest.mark.parametrize("last", [True, False], ids=["after a whole image", "within one"])
def test_a_callback_ends_rows_that_would_go_on(last):
    model = talkative_model()
    inputs = batch_of(model.config, [[20, 21], [22]])
    scales = model.config.vq_config.scale_schedules.build().num_scales
    seen = []

    def until_one_image(_, scale, state):
        seen.append(scale)
        return not state.is_finished if last else scale < 1

    output = model.generate_interleaved(
        **inputs, min_images=2, max_images=3, max_new_tokens=8, sampling=GREEDY, callback=until_one_image
    )
    assert seen == list(range(scales if last else 2)) and output.finish_reasons == ["interrupted"] * 2
    for pieces in output.segments:
        assert pieces[-1].image is not None and sum(piece.image is not None for piece in pieces) == 1


def test_stop_strings_and_the_end_of_turn_end_a_row():
    model = talkative_model()
    tokenizer = tiny_tokenizer()
    inputs = batch_of(model.config, [[20, 21], [22]])
    options = {"max_images": 0, "do_sample": False, "max_new_tokens": 20}
    free = model.generate_interleaved(**inputs, **options, eos_token_id=-1)
    tail = free.input_ids[0, -20:]
    text = tokenizer.decode(tail[5:8])
    stopped = model.generate_interleaved(**inputs, **options, eos_token_id=-1, stop_strings=[text], tokenizer=tokenizer)
    (piece,) = stopped.segments[0]
    assert text in tokenizer.decode(stopped.input_ids[0, piece.start : piece.stop])
    assert piece.stop - piece.start <= 8
    ended = model.generate_interleaved(**inputs, **options, eos_token_id=int(tail[3]))
    (piece,) = ended.segments[0]
    assert int(ended.input_ids[0, piece.stop - 1]) == int(tail[3]) and piece.stop - piece.start <= 4


def test_streamer_gives_text_and_scales_in_order():
    model = talkative_model()
    tokenizer = tiny_tokenizer()
    inputs = batch_of(model.config, [rows_of(model.config)[0]])
    options = {"sampling": GREEDY, "do_sample": False, "max_new_tokens": 8, "max_images": 2}
    streamer = InterleavedStreamer(tokenizer, timeout=30)
    thread = Thread(target=model.generate_interleaved, kwargs={**inputs, **options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    output = model.generate_interleaved(**inputs, **options)
    expected = []
    for piece in output.segments[0]:
        if piece.image is None:
            expected.append(tokenizer.decode(output.input_ids[0, piece.start : piece.stop]))
        else:
            expected.append(output.image_tokens[piece.image])
    merged = []
    for piece in pieces:
        if isinstance(piece, ScaleState):
            merged.append(piece.image_tokens[0])
        elif merged and isinstance(merged[-1], str):
            merged[-1] += piece
        else:
            merged.append(piece)
    # Of the scales of an image the last holds all codes.
    following = [*merged[1:], ""]
    last = [
        piece
        for piece, after in zip(merged, following)
        if isinstance(piece, str) or isinstance(after, str) or len(after) < len(piece)
    ]
    assert len(last) == len(expected) and any(isinstance(piece, str) for piece in last)
    for found, wanted in zip(last, expected):
        assert found == wanted if isinstance(wanted, str) else torch.equal(found, wanted[: len(found)])
    previews = [piece.preview()[0] for piece in pieces if isinstance(piece, ScaleState)]
    assert all(preview.shape == (3, 16, 16) for preview in previews)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_images": -1}, "0 <= min_images <= max_images must hold, got 0 and -1"),
        ({"min_images": 2}, "0 <= min_images <= max_images must hold, got 2 and 1"),
        ({"max_images": 0}, "Row 1 ends with <boi> and may draw 0 images"),
        ({"image_sizes": [(16, 16)]}, "2 prompts came with 1 image_sizes"),
        ({"generator": [torch.Generator()]}, "1 generators came with a batch of 2"),
        ({"stop_strings": ["x"]}, "stop_strings need the tokenizer"),
        ({"streamer": InterleavedStreamer(tiny_tokenizer())}, "A streamer follows one row, got 2"),
        ({"sampling": ImageSampling(guidance_scale=2.0)}, "Guidance needs negative_input_ids"),
        ({"max_new_token": 3}, "not written with max_new_token"),
        ({"generation_config": GenerationConfig(num_beams=4)}, "not written with num_beams"),
        ({"do_sample": True, "top_p": 0.0}, "top_p must be above 0"),
        ({"do_sample": True, "top_k": -1}, "top_k must be a whole number from 1"),
        ({"attention_mask": torch.tensor([[1, 1], [1, 0]])}, "input_ids are padded on the right"),
    ],
)
def test_interleaved_inputs_that_do_not_fit_are_refused(change, message):
    model = tiny_model()
    inputs = {"input_ids": torch.tensor([[20, 21], [22, 3]])}
    with pytest.raises(ValueError, match=message):
        model.generate_interleaved(**inputs | change)


def test_a_generation_config_sets_what_text_takes():
    model = talkative_model()
    inputs = batch_of(model.config, [[20, 21]])
    options = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 6, "top_k": 0}

    def run(**given):
        return model.generate_interleaved(**inputs, max_images=0, generator=torch.Generator().manual_seed(0), **given)

    by_config = run(generation_config=GenerationConfig(**options))
    assert torch.equal(by_config.input_ids, run(**options).input_ids)


def test_what_a_generation_config_leaves_open_is_the_models_own_as_in_generate():
    model = talkative_model()
    model.generation_config.update(do_sample=True, temperature=0.7, max_new_tokens=6, eos_token_id=[5, 6])
    inputs, seen = batch_of(model.config, [[20, 21]]), []

    def run(**given):
        generator = torch.Generator().manual_seed(0)
        seen.append(model.generate_interleaved(**inputs, max_images=0, generator=generator, **given).input_ids)
        return seen[-1]

    assert torch.equal(run(generation_config=GenerationConfig(top_k=200)), run(top_k=200))
    assert not torch.equal(seen[0], run(do_sample=False))


def test_settings_of_the_models_own_config_that_text_does_not_take_are_warned_of():
    model, inputs = tiny_model(), {"input_ids": torch.tensor([[20, 21]]), "max_images": 0, "max_new_tokens": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate_interleaved(**inputs)
        model.generation_config.update(repetition_penalty=1.0, num_beams=1, min_length=0, temperature=0.5, top_k=50)
        model.generate_interleaved(**inputs)
    model.generation_config.update(repetition_penalty=1.05, min_p=0.1)
    with pytest.warns(UserWarning, match="config sets repetition_penalty, min_p, which generate uses"):
        model.generate_interleaved(**inputs)


@pytest.mark.parametrize("ends", [None, []])
def test_a_model_without_an_end_of_turn_writes_and_draws_up_to_its_limits(ends):
    model = tiny_model(text_config={"eos_token_id": None})
    model.generation_config.eos_token_id = ends
    inputs = batch_of(model.config, [[20, 21]])
    output = model.generate_interleaved(**inputs, min_images=1, max_new_tokens=3, sampling=GREEDY, do_sample=False)
    assert sum(piece.stop - piece.start for piece in output.segments[0] if piece.image is None) == 3
    assert len(output.image_tokens) == 1


def test_a_streamer_takes_its_timeout_second_and_skips_nothing():
    streamer = InterleavedStreamer(tiny_tokenizer(), 30)
    assert streamer.timeout == 30 and not streamer.skip_prompt
