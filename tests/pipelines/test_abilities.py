"""Editing, regions, variations, thinking, videos, conversations, candidates: each against what it is made of."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from reference_nextflow import ReferenceImage, as_batch, code_targets, cross_entropy, quantize
from test_generation import draw, negative, prompts, schedules_of, teacher_forced_logits
from test_modeling import random_image, special_tokens
from tiny import tiny_model, tiny_processor

from transformers_nextflow import ImageSampling, KeptRegion, NextFlowPipeline
from transformers_nextflow.generation.region_editing import NOISE_SHARE
from transformers_nextflow.video_processing_nextflow import read_frames, write_frames
from transformers_nextflow.vision_tokenizer.resampling import resample


GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def pipe():
    model, processor = tiny_model(), tiny_processor()
    processor.think_prefix = "think:"
    # An answer that ends at once would leave nothing to look at.
    model.generation_config.eos_token_id = -1
    pipe = NextFlowPipeline(model, processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_image(seed=0, size=(16, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


# --- guidance over images ---


def test_guidance_over_images_and_over_text_equals_its_formula():
    model = tiny_model()
    shown = random_image(model.config)
    schedules = schedules_of(model.config, [(16, 16)])
    contexts = [[20, shown, 21], [shown, 22], [22]]
    inputs = prompts(model.config, [contexts[0]]) | negative(prompts(model.config, [contexts[1]]))
    unconditional = prompts(model.config, [contexts[2]])
    inputs |= {f"unconditional_{name}": value for name, value in unconditional.items()}
    sampling = ImageSampling(guidance_scale=3.0, image_guidance_scale=1.5, num_unguided_scales=1)
    output, logits = draw(model, schedules, inputs, sampling=sampling)
    whole, images, nothing = (
        teacher_forced_logits(model, [row], schedules, output.image_tokens)[0] for row in contexts
    )
    expected = nothing + 1.5 * (images - nothing) + 3.0 * (whole - images)
    start = schedules[0].offsets[-2]
    torch.testing.assert_close(torch.cat(logits[0][:-1]), expected[:start], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[0][-1], whole[start:], atol=1e-4, rtol=0)


def test_guidance_over_images_asks_for_prompts_without_them():
    model = tiny_model()
    inputs = prompts(model.config, [[20, random_image(model.config)]])
    inputs |= negative(prompts(model.config, [[random_image(model.config)]]))
    with pytest.raises(ValueError, match="Guidance needs unconditional_input_ids"):
        draw(model, schedules_of(model.config, [(16, 16)]), inputs, sampling=ImageSampling(image_guidance_scale=2.0))


# --- editing ---


def test_an_edit_reads_its_image_and_keeps_its_size(pipe):
    wide = make_image(size=(32, 8))
    edited = pipe("make it red", image=wide, generator=seeds(0))
    assert edited.images[0].size == (32, 8)
    plain = pipe("make it red", height=8, width=32, generator=seeds(0))
    other = pipe("make it red", image=make_image(1, (32, 8)), generator=seeds(0))
    assert not torch.equal(edited.image_tokens, plain.image_tokens)
    assert not torch.equal(edited.image_tokens, other.image_tokens)
    inputs = pipe.processor.apply_image_prompt(["make it red"], [[wide]])
    drawn = pipe.model.generate_images(**inputs, image_sizes=[(8, 32)], generator=seeds(0))
    assert torch.equal(edited.image_tokens, drawn.image_tokens)


def test_several_images_and_a_batch_equal_single_calls(pipe):
    texts, images = ["a red circle", "two stars"], [[make_image(1), make_image(2, (16, 16))], make_image(3)]
    options = {"guidance_scale": 2.0, "image_guidance_scale": 1.5}
    together = pipe(texts, image=images, generator=seeds(5, 6), **options)
    for row, seed in enumerate((5, 6)):
        alone = pipe(texts[row], image=images[row], generator=seeds(seed), **options)
        assert torch.equal(alone.image_tokens[0], together.image_tokens[row])
    swapped = pipe(texts[0], image=images[0][::-1], generator=seeds(5), **options)
    assert not torch.equal(swapped.image_tokens[0], together.image_tokens[0])


# --- regions ---


@pytest.mark.parametrize("ratio", [(16, 16), (8, 32)])
def test_codes_outside_a_region_are_the_nearest_to_what_is_left(ratio):
    model = tiny_model()
    (schedule,) = schedules_of(model.config, [ratio])
    height, width = schedule.image_size(4)
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    region = torch.zeros(height, width, dtype=torch.bool)
    region[1:5, 2:6] = True
    kept = KeptRegion(model.vq_model, [pixels], [region])
    output, _ = draw(model, [schedule], prompts(model.config, [[20, 21]]), region=kept)
    codes = output.image_tokens[0].tolist()
    quantizer = model.vq_model.quantizer
    config = model.config.vq_config
    with torch.no_grad():
        nearest, _ = quantize(
            model.vq_model.encode_latents(pixels[None])[0],
            list(schedule.grids),
            quantizer.semantic_codebook.weight,
            quantizer.pixel_codebook.weight,
            (config.semantic_distance_weight, config.pixel_distance_weight),
            config.normalize_codes,
            config.downsample,
            config.upsample,
            drawn=codes,
        )
    outside = []
    for (rows, columns), start in zip(schedule.grids, schedule.offsets):
        for i in range(rows):
            for j in range(columns):
                top, bottom = i * height // rows, -(-(i + 1) * height // rows)
                left, right = j * width // columns, -(-(j + 1) * width // columns)
                if not region[top:bottom, left:right].any():
                    outside.append(start + i * columns + j)
    assert len(outside) > schedule.tokens_per_scale[-1] // 2
    assert [codes[n] for n in outside] == [nearest[n] for n in outside]
    assert codes != nearest
    free, _ = draw(model, [schedule], prompts(model.config, [[20, 21]]))
    whole = KeptRegion(model.vq_model, [pixels], [torch.ones_like(region)])
    drawn, _ = draw(model, [schedule], prompts(model.config, [[20, 21]]), region=whole)
    assert torch.equal(free.image_tokens, drawn.image_tokens)


@pytest.mark.parametrize("upsample, downsample", [("nearest", "area"), ("rotary", "rotary")])
def test_codes_across_the_edge_weigh_what_the_image_shows_outside(upsample, downsample):
    """Against the squared distances cell by cell, on an image of 4 x 4 cells of which one column is drawn."""
    model = tiny_model(vq_config={"upsample": upsample, "downsample": downsample, "scales": [1, 2, 4]})
    (schedule,) = schedules_of(model.config, [(16, 16)])
    quantizer = model.vq_model.quantizer
    pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    region = torch.zeros(16, 16, dtype=torch.bool)
    region[:, :4] = True
    kept = KeptRegion(model.vq_model, [pixels], [region])
    before = torch.tensor([[5]])
    with torch.no_grad():
        logits = torch.zeros(1, 4, len(quantizer.codebook))
        found = kept.condition(logits, before, slice(None), schedule)
        latents = model.vq_model.encode_latents(pixels[None])
        own = quantizer.encode(latents, schedule).image_tokens[:, :5]
        noise = NOISE_SHARE * (latents - quantizer.decode(own, schedule)).square().mean()
        rest = latents - quantizer.decode(before, schedule)
        for cell in range(4):
            rows = slice(2 * (cell // 2), 2 * (cell // 2) + 2)
            # Of the left cells only the second column lies outside, of the right ones all does.
            columns = slice(1, 2) if cell % 2 == 0 else slice(2, 4)
            squares = []
            for vector in quantizer.codebook:
                code = torch.zeros(1, rest.shape[1], 2, 2)
                code[0, :, cell // 2, cell % 2] = vector
                spread = resample(code, schedule.final_grid, upsample)
                squares.append((rest - spread)[0, :, rows, columns].square().sum())
            expected = -torch.stack(squares) / (2 * noise)
            torch.testing.assert_close(
                found[0, cell] - found[0, cell].max(), expected - expected.max(), atol=2e-3, rtol=1e-4
            )


def test_pasted_back_pixels_equal_the_images_own(pipe):
    own, mask = make_image(4), Image.new("L", (16, 16))
    mask.paste(255, (4, 0, 12, 7))
    plain = pipe("a star", image=own, mask_image=mask, generator=seeds(0)).images[0]
    pasted = pipe("a star", image=own, mask_image=mask, generator=seeds(0), paste_back=True).images[0]
    inside = np.asarray(mask) > 0
    assert np.array_equal(np.asarray(pasted)[~inside], np.asarray(own)[~inside])
    assert np.array_equal(np.asarray(pasted)[inside], np.asarray(plain)[inside])
    assert not np.array_equal(np.asarray(plain)[~inside], np.asarray(own)[~inside])


def test_masks_follow_their_image_through_resizing_and_cropping(pipe):
    own, mask = make_image(4, (40, 32)), Image.new("L", (40, 32))
    mask.paste(255, (0, 0, 20, 32))
    region = pipe.processor.image_processor.preprocess_mask(mask, own)
    height, width = region.shape
    schedule = pipe.processor.image_processor.schedule_of(32, 40)
    assert (height, width) == schedule.image_size(4)
    assert region[:, : width // 2 - 1].all() and not region[:, width // 2 + 1 :].any()


def test_masked_batch_equals_single_calls(pipe):
    masks = [Image.new("L", (16, 16)), Image.new("L", (32, 8))]
    masks[0].paste(255, (0, 0, 8, 8))
    masks[1].paste(255, (16, 0, 32, 8))
    images = [make_image(1), make_image(2, (32, 8))]
    together = pipe(["one", "two"], image=images, mask_image=masks, generator=seeds(0, 1))
    for row in range(2):
        alone = pipe(["one", "two"][row], image=images[row], mask_image=masks[row], generator=seeds(row))
        codes = together.image_tokens[row]
        assert torch.equal(alone.image_tokens[0], codes[codes >= 0])


def test_masks_of_every_form_mark_the_same(pipe):
    image, mask = make_image(1), np.zeros((16, 16), dtype=np.uint8)
    mask[:8, :8] = 255
    tensor = torch.from_numpy(mask)
    forms = [Image.fromarray(mask), mask, mask > 0, mask / 255, tensor, tensor[None], tensor[None, None], [mask]]
    drawn = [pipe("one", image=image, mask_image=form, generator=seeds(0)).image_tokens for form in forms]
    assert all(torch.equal(codes, drawn[0]) for codes in drawn)
    for form in ([mask, tensor], [[mask], [tensor]], torch.stack([tensor[None]] * 2)):
        together = pipe(["one", "one"], image=[image, image], mask_image=form, generator=seeds(0, 0)).image_tokens
        assert torch.equal(together, drawn[0].expand(2, -1))


def test_a_mask_with_transparent_pixels_is_refused_and_an_opaque_one_with_an_alpha_channel_is_not(pipe):
    process, image = pipe.processor.image_processor.preprocess_mask, make_image(1)
    opaque = Image.new("RGBA", (16, 16), "black")
    opaque.paste("white", (0, 0, 8, 8))
    assert process(opaque, image).mean() == 0.25
    painted, hole = Image.new("RGBA", (16, 16)), opaque.copy()
    painted.paste("white", (0, 0, 8, 8))
    hole.putpixel((3, 3), (0, 0, 0, 0))
    for mask in (painted, hole, painted.convert("LA"), np.asarray(painted), torch.from_numpy(np.array(hole))):
        with pytest.raises(ValueError, match="The mask has transparent pixels"):
            process(mask, image)


def test_images_of_every_form_are_the_same(pipe):
    array = np.asarray(make_image(1))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    drawn = [pipe("one", image=form, **GREEDY).image_tokens for form in (make_image(1), array, tensor, tensor[None])]
    assert all(torch.equal(codes, drawn[0]) for codes in drawn)
    together = pipe(["one", "one"], image=torch.stack([tensor, tensor]), **GREEDY).image_tokens
    assert torch.equal(together, drawn[0].expand(2, -1))
    both = pipe("one", image=torch.stack([tensor, tensor]), **GREEDY).image_tokens
    assert torch.equal(both, pipe("one", image=[array, array], **GREEDY).image_tokens)


# --- variations ---


@pytest.mark.filterwarnings("ignore:The variation for prompt 0 is the image")  # where all scales are kept
def test_a_variation_keeps_the_first_scales_and_draws_the_rest(pipe):
    images = [make_image(1), make_image(2, (32, 8))]
    varied = pipe(["one", "two"], image=images, num_kept_scales=2, generator=seeds(0, 1)).image_tokens
    for row, own in enumerate(images):
        inputs = pipe.processor.image_processor([own], return_tensors="pt")
        codes = pipe.model.get_image_tokens(**inputs)[0]
        schedule = pipe.processor.image_processor.schedule_of(own.height, own.width)
        kept = schedule.offsets[2]
        assert torch.equal(varied[row, :kept], codes[:kept])
        assert not torch.equal(varied[row, kept : len(codes)], codes[kept:])
    everything = pipe("one", image=images[0], num_kept_scales=4).image_tokens
    inputs = pipe.processor.image_processor(images[:1], return_tensors="pt")
    assert torch.equal(everything, pipe.model.get_image_tokens(**inputs))


COLD = {"temperature": [0.7, 0.7, 0.0, 0.0], "guidance_scale": 1.0}


def test_variations_that_cannot_differ_are_refused(pipe):
    options = {"image": make_image(1), "num_images_per_prompt": 4}
    assert len(set(codes_of(pipe("one", num_kept_scales=1, **options, **COLD)))) > 1
    for settings in ({"num_kept_scales": 2} | COLD, {"num_kept_scales": 3} | COLD, {"num_kept_scales": 4}):
        with pytest.raises(ValueError, match="The 4 variations of a prompt would be one image: .* a temperature above"):
            pipe("one", **options, **settings)
    for settings in ({"temperature": 0.0}, {"top_k": 1}):
        with pytest.raises(ValueError, match="would be one image"):
            pipe("one", **options, num_kept_scales=1, **settings)
    assert len(set(codes_of(pipe("one", num_kept_scales=2, **options, **(COLD | {"temperature": 1.0}))))) > 1
    with pytest.raises(ValueError, match="The 2 variations"):
        pipe(
            "one", image=make_image(1), num_candidates=2, candidate_scorer=lambda *_: [0, 1], num_kept_scales=2, **COLD
        )


def codes_of(output) -> list[tuple[int, ...]]:
    return [tuple(codes.tolist()) for codes in output.image_tokens]


@pytest.mark.filterwarnings("ignore:The variation for prompt 0 is the image")  # told for each prompt
def test_variations_that_are_all_the_same_are_warned_of(pipe):
    options = {"num_kept_scales": 1, "num_images_per_prompt": 2}
    same = {"generator": seeds(0, 0), **options}
    with pytest.warns(UserWarning, match="All 2 variations for prompt 0 are the same image: the first 1 scales"):
        pipe("one", image=make_image(1), **same)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("one", image=make_image(1), generator=seeds(0, 1), **options)
    with pytest.warns(UserWarning, match="The variation for prompt 1 is the image itself"):
        pipe(["one", "two"], image=[make_image(1), make_image(2, (32, 8))], num_kept_scales=4)


# --- thinking ---


def test_thoughts_differ_by_seed_above_temperature_zero(pipe):
    def thoughts(temperature, seeds):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"think": True, "max_thought_tokens": 6, "thought_temperature": temperature}
        return pipe("a red circle", **options, num_images_per_prompt=len(seeds), generator=generator).thoughts

    assert len(set(thoughts(0.0, range(4)))) == 1
    assert len(set(thoughts(2.0, range(4)))) > 1
    assert thoughts(2.0, (3, 5)) == [thoughts(2.0, (seed,))[0] for seed in (3, 5)]
    with pytest.raises(ValueError, match="temperature must be a number from 0, got -1"):
        thoughts(-1.0, (0,))


def test_thinking_draws_from_what_it_wrote(pipe):
    texts = ["a red circle", "two blue squares and a star"]
    output = pipe(texts, think=True, max_thought_tokens=6, **GREEDY, guidance_scale=2.0)
    assert all(output.thoughts)
    config = pipe.model.config
    for row, text in enumerate(texts):
        ids = pipe.processor.apply_image_prompt([text], answer="think:")["input_ids"]
        written = pipe.model.generate_interleaved(ids, max_new_tokens=6, max_images=0)
        assert pipe.processor.decode(written.input_ids[0, ids.shape[1] :]).strip() == output.thoughts[row]
        ids = torch.cat([written.input_ids, torch.tensor([[config.boi_token_id]])], dim=1)
        nothing = pipe.processor.apply_image_prompt([""], allow_empty=True)
        drawn = pipe.model.generate_images(
            ids, image_sizes=[(16, 16)], **negative(nothing), sampling=ImageSampling(guidance_scale=2.0, **GREEDY)
        )
        assert torch.equal(drawn.image_tokens[0], output.image_tokens[row])


# --- candidates and scores ---


def test_the_best_of_the_candidates_is_kept(pipe):
    seen = []

    def scorer(caller, image_tokens, image_grids, texts):
        seen.append((image_tokens, texts))
        return [0.0, 2.0, 1.0, 5.0, 3.0, 4.0]

    output = pipe(["one", "two"], num_candidates=3, candidate_scorer=scorer, generator=seeds(*range(6)))
    [(image_tokens, texts)] = seen
    assert texts == ["one"] * 3 + ["two"] * 3
    assert torch.equal(output.image_tokens, image_tokens[[1, 3]]) and len(output.images) == 2
    assert output.candidate_scores.tolist() == [[0.0, 2.0, 1.0], [5.0, 3.0, 4.0]]
    second = pipe("one", generator=seeds(1))
    assert torch.equal(second.image_tokens[0], output.image_tokens[0])


def test_candidates_are_judged_by_how_well_they_are_described(pipe):
    output = pipe("a red circle", num_candidates=3, generator=seeds(0, 1, 2))
    singles = [pipe("a red circle", generator=seeds(n)).images[0] for n in range(3)]
    inputs = pipe.processor.image_processor(singles, return_tensors="pt")
    codes = torch.cat([pipe("a red circle", generator=seeds(n)).image_tokens for n in range(3)])
    expected = slow_scores(pipe, codes, inputs["image_grids"], ["a red circle"] * 3)[0]
    length = len(pipe.processor.tokenizer("a red circle")["input_ids"]) + 1
    torch.testing.assert_close(output.candidate_scores[0], torch.tensor(expected) / length, atol=1e-4, rtol=0)


def slow_scores(pipe, codes, grids, texts):
    """Log-likelihoods of texts given images and of images given texts, token by token from full passes."""
    model, processor = pipe.model, pipe.processor
    text_scores, image_scores = [], []
    for tokens, grid, text in zip(codes, grids, texts):
        (schedule,) = model.model.schedules_of(grid[None])
        shown = ReferenceImage(list(schedule.grids), tokens[: schedule.num_tokens].tolist())
        answer = processor.tokenizer(text)["input_ids"] + [processor.tokenizer.eos_token_id]
        before, after = chat_around(processor, processor.caption_request)
        sequence = [*before, shown, *after, *answer]
        laid_out, inputs = as_batch([sequence], *special_tokens(model.config))
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        first = len(laid_out[0]) - len(answer)
        text_scores.append(-sum(cross_entropy(logits[first + n - 1], token) for n, token in enumerate(answer)))
        prompt = processor.prompt_ids([text])[0]
        laid_out, inputs = as_batch([[*prompt, shown]], *special_tokens(model.config))
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        size = model.config.text_config.vocab_size
        image_scores.append(-sum(cross_entropy(logits[n], size + code) for n, code, _, _ in code_targets(laid_out[0])))
    return text_scores, image_scores


def chat_around(processor, text):
    """Token ids of a question on either side of its image."""
    image = processor.image_token_id
    ids = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
        chat_template=processor.chat_template,
        add_generation_prompt=True,
        return_dict=False,
    )
    return ids[: ids.index(image)], ids[ids.index(image) + 1 :]


def test_scores_equal_sums_over_full_passes(pipe):
    images, texts = [make_image(1), make_image(2, (32, 8))], ["a red circle", "two blue squares and a green star"]
    scores = pipe.score(images, texts)
    inputs = pipe.processor.image_processor(images, return_tensors="pt")
    codes = pipe.model.get_image_tokens(**inputs)
    text_scores, image_scores = slow_scores(pipe, codes, inputs["image_grids"], texts)
    torch.testing.assert_close(scores.text_given_image, torch.tensor(text_scores), atol=1e-3, rtol=0)
    torch.testing.assert_close(scores.image_given_text, torch.tensor(image_scores), atol=1e-3, rtol=0)


# --- videos ---


@pytest.mark.parametrize("with_first_frame", [False, True])
def test_a_video_with_given_texts_is_drawn_frame_after_frame(pipe, with_first_frame):
    scripts = [["a red circle", "it moves", "it moves again"], ["two stars", "one goes", "nothing changes"]]
    first = [make_image(1), make_image(2)] if with_first_frame else None
    video = pipe.video(scripts, image=first, **GREEDY)
    assert video.transitions == [script[1:] for script in scripts]
    processor, model = pipe.processor, pipe.model
    (schedule,) = model.model.schedules_of(torch.tensor([[4, 4]]))
    for row, script in enumerate(scripts):
        if with_first_frame:
            inputs = processor.image_processor([first[row]], return_tensors="pt")
            shown = ReferenceImage(list(schedule.grids), model.get_image_tokens(**inputs)[0].tolist())
            before, after = chat_around(processor, script[0])
            sequence, images = [*before, shown, *after], [shown]
        else:
            sequence, images = processor.prompt_ids([script[0]])[0], []
        for frame in range(len(images), 3):
            if frame:
                sequence = [*sequence, *processor.tokenizer(script[frame])["input_ids"]]
            inputs = prompts(model.config, [sequence])
            drawn = model.generate_images(**inputs, image_sizes=[(16, 16)], sampling=ImageSampling(**GREEDY))
            images.append(ReferenceImage(list(schedule.grids), drawn.image_tokens[0].tolist()))
            sequence = [*sequence, images[-1]]
        codes = torch.tensor([shown.codes for shown in images])
        expected = processor.post_process_images(model.decode_image_tokens(codes, torch.tensor([[4, 4]] * 3)))
        if with_first_frame:
            expected[0] = first[row]
        for found, wanted in zip(video.frames[row], expected, strict=True):
            assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_a_video_writes_its_own_texts_and_has_the_frames_asked_for(pipe):
    video = pipe.video(["a red circle", "two stars"], num_frames=3, max_transition_tokens=2, **GREEDY)
    assert [len(frames) for frames in video.frames] == [3, 3] and [len(texts) for texts in video.transitions] == [2, 2]
    alone = pipe.video("two stars", num_frames=3, max_transition_tokens=2, **GREEDY)
    for found, wanted in zip(alone.frames[0], video.frames[1]):
        assert np.array_equal(np.asarray(found), np.asarray(wanted))
    first = pipe.video("two stars", image=make_image(1), num_frames=2, **GREEDY)
    assert np.array_equal(np.asarray(first.frames[0][0]), np.asarray(make_image(1))) and len(first.transitions[0]) == 1


def test_a_video_without_a_first_frame_has_no_guidance_towards_images():
    pipe = NextFlowPipeline(tiny_model(), tiny_processor())
    pipe.set_progress_bar_config(disable=True)
    pipe.model.generation_config.editing_sampling = {"image_guidance_scale": 2.0, "temperature": 0.0}
    pipe.video("a star", num_frames=2, max_transition_tokens=2)
    pipe.video("a star", image=make_image(), num_frames=2, max_transition_tokens=2)


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_videos_are_written_and_read_frame_by_frame(tmp_path, suffix):
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg")
    colors = ["red", "lime", "blue"]
    frames = [Image.new("RGB", (32, 32), color) for color in colors]
    write_frames(frames, tmp_path / f"video{suffix}", frames_per_second=2)
    read = read_frames(tmp_path / f"video{suffix}")
    assert len(read) == 3
    for found, wanted in zip(read, frames):
        assert found.size == (32, 32)
        assert np.abs(np.asarray(found).astype(int) - np.asarray(wanted)).max() < 30


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
@pytest.mark.parametrize("colors", ["rrgb", "rggr", "rrrr", "rr", "rrrgggr"])
def test_videos_keep_frames_that_are_equal_to_the_one_before(tmp_path, suffix, colors):
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg")
    named = {"r": "red", "g": "lime", "b": "blue"}
    frames = [Image.new("RGB", (32, 32), named[color]) for color in colors]
    write_frames(frames, tmp_path / f"video{suffix}", frames_per_second=4)
    read = read_frames(tmp_path / f"video{suffix}")
    assert len(read) == len(frames)
    for found, wanted in zip(read, frames):
        assert np.abs(np.asarray(found).astype(int) - np.asarray(wanted)).max() <= (0 if suffix == ".gif" else 4)
    if suffix == ".gif":
        with Image.open(tmp_path / "video.gif") as video:
            assert [frame.info["duration"] for frame in ImageSequence.Iterator(video)] == [250] * len(frames)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_frames_of_any_mode_are_written(tmp_path, mode):
    black, white = (Image.new("RGB", (16, 16), color).convert(mode) for color in ("black", "white"))
    frames = [black, black, white, white, white, black]
    write_frames(frames, tmp_path / "video.gif")
    read = read_frames(tmp_path / "video.gif")
    assert [frame.convert("RGB").getpixel((0, 0))[0] > 127 for frame in read] == [False, False, True, True, True, False]


def test_noise_that_a_gif_can_only_approach_keeps_its_number_of_frames(tmp_path):
    frames = [make_image(0), make_image(0), make_image(1), make_image(0)]
    frames[1].putpixel((0, 0), tuple(value ^ 1 for value in frames[1].getpixel((0, 0))))
    write_frames(frames, tmp_path / "video.gif", frames_per_second=3)
    assert len(read_frames(tmp_path / "video.gif")) == 4


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), 1e9])
def test_rates_that_no_video_has_are_refused(tmp_path, rate):
    with pytest.raises(ValueError, match="frames_per_second goes from 0.01 to 100, got"):
        write_frames([make_image(0)], tmp_path / "video.gif", frames_per_second=rate)


def test_a_video_that_cannot_be_written_to_its_end_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "video.gif"
    write_frames([make_image(0), make_image(1)], path)
    before = path.read_bytes()

    def full(self, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_frames([make_image(2)], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# --- conversations ---


def test_a_video_in_a_conversation_is_read_as_its_frames(pipe):
    frames = [make_image(n) for n in range(3)]
    question = {"type": "text", "text": "what happens?"}
    video = [{"role": "user", "content": [{"type": "video", "video": frames}, question]}]
    images = [{"role": "user", "content": [{"type": "image", "image": f} for f in frames] + [question]}]
    options = {"max_images": 0, "max_new_tokens": 5}
    assert pipe.chat(video, **options) == pipe.chat(images, **options)
    assert pipe.chat(video, **options) != pipe.chat([{"role": "user", "content": [question]}], **options)


def test_conversations_go_on_in_text_and_images_and_a_batch_equals_single_ones(pipe):
    first = [{"role": "user", "content": [{"type": "text", "text": "draw a red circle"}]}]
    second = [
        {"role": "user", "content": [{"type": "image", "image": make_image(1)}, {"type": "text", "text": "and?"}]}
    ]
    options = {"min_images": 1, "max_new_tokens": 4, "sampling": ImageSampling(guidance_scale=2.0, **GREEDY)}
    together = pipe.chat([first, second], **options)
    for conversation, answer in zip((first, second), together):
        alone = pipe.chat(conversation, **options)
        assert [part["type"] for part in alone["content"]] == [part["type"] for part in answer["content"]]
        for found, wanted in zip(alone["content"], answer["content"]):
            assert np.array_equal(*(np.asarray(part[part["type"]]) for part in (found, wanted)))
        assert sum(part["type"] == "image" for part in alone["content"]) == 1
    longer = [*first, together[0], {"role": "user", "content": [{"type": "text", "text": "what color is it?"}]}]
    assert pipe.chat(longer, max_images=0, max_new_tokens=3)["content"][0]["type"] == "text"


# --- what is refused ---


MASK = Image.new("L", (16, 16), 255)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image": []}, "empty list of images"),
        ({"prompt": "", "image": make_image()}, "Prompt 0 is empty"),
        ({"prompt": ["one", "two"], "image": [make_image()]}, "2 prompts came with 1 images"),
        ({"prompt": ["one", "two"], "image": make_image()}, "2 prompts came with 1 images"),
        ({"image": make_image(size=(90, 10))}, "outside 1:4 to 4:1"),
        ({"mask_image": MASK}, "give image="),
        ({"mask_image": MASK, "image": [make_image(), make_image()]}, "give image="),
        ({"mask_image": MASK, "image": make_image(size=(32, 8))}, "16x16 pixels, its image 32x8"),
        ({"mask_image": Image.new("L", (16, 16)), "image": make_image()}, "marks no pixels"),
        ({"mask_image": MASK, "image": make_image(), "height": 8, "width": 32}, "its size cannot change"),
        ({"paste_back": True, "image": make_image()}, "give mask_image"),
        ({"num_kept_scales": 5, "image": make_image()}, "from 1 to the 4 scales, got 5"),
        ({"num_kept_scales": 2}, "give image="),
        ({"num_kept_scales": 2.0, "image": make_image()}, "from 1 to the 4 scales, got 2.0"),
        ({"prompt": ["one"], "image": [make_image()], "mask_image": MASK}, "1 prompts came with 1 masks; give a list"),
        ({"mask_image": [MASK, MASK], "image": make_image()}, "1 prompts came with 2 masks"),
        ({"mask_image": torch.ones(2, 1, 16, 16), "image": make_image()}, "1 prompts came with 2 masks"),
        (
            {"mask_image": np.ones((2, 16, 16)), "image": make_image()},
            r"A mask is one image, got <ndarray of shape \(2, 16",
        ),
        ({"mask_image": [[MASK, MASK]], "image": make_image()}, "A mask is one image, got .* give one for each prompt"),
        ({"mask_image": [], "image": make_image()}, "1 prompts came with 0 masks"),
        ({"prompt": ["one"] * 2, "image": [make_image()] * 2, "mask_image": [MASK] * 3}, "2 prompts came with 3 masks"),
        ({"prompt": ["one"] * 2, "image": [make_image()] * 2, "mask_image": [MASK, [MASK] * 2]}, "A mask is one image"),
        ({"image": [[make_image()], [make_image()]]}, "1 prompts came with lists of images in lists"),
        ({"prompt": ["one"], "image": [[[make_image()]]]}, "1 prompts came with lists of images in lists"),
        ({"prompt": ["one"] * 2, "image": torch.ones(3, 3, 16, 16)}, "2 prompts came with 3 images"),
        ({"image": [None]}, "Image 0 cannot be read: it is None"),
        ({"prompt": np.zeros((99, 99))}, r"list of strings, got <ndarray of shape \(99, 99\)>"),
        ({"negative_prompt": [torch.zeros(99)]}, r"must be a string, got <Tensor of shape \(99,\)>"),
        ({"num_candidates": 0}, "num_candidates must be a whole number from 1, got 0"),
        ({"image_guidance_scale": 2.0}, "give image=, or leave it at 1"),
        ({"think": True, "image": make_image(), "num_kept_scales": 1}, "think cannot be combined with"),
    ],
)
def test_bad_requests_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": "one"} | arguments))


def test_thinking_is_refused_where_it_was_not_trained():
    pipe = NextFlowPipeline(tiny_model(), tiny_processor())
    with pytest.raises(ValueError, match="not trained to think"):
        pipe("one", think=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": "one"}, "num_frames, or a text for each frame"),
        ({"prompt": ["one", ["two", "three"]]}, "not both"),
        ({"prompt": [["one", "two"], ["three"]]}, "one text for each of num_frames"),
        ({"prompt": [["one", "two"]], "num_frames": 3}, "one text for each of num_frames"),
        ({"prompt": "one", "num_frames": 1}, "at least 2 frames, got 1"),
        ({"prompt": "", "num_frames": 2}, "Prompt 0 is empty"),
        ({"prompt": [], "num_frames": 2}, r"a video's text, .* got \[\]"),
        ({"prompt": None, "num_frames": 2}, "a video's text, .* got None"),
        ({"prompt": "one", "num_frames": 0}, "at least 2 frames, got 0"),
        ({"prompt": "one", "num_frames": 2.0}, "num_frames must be a whole number from 2 to 1024, .*; got 2.0"),
        ({"prompt": ["one"], "num_frames": 3, "image": [[make_image(), make_image()]]}, "one first frame, got 2"),
        ({"prompt": "one", "num_frames": 2, "image": make_image(), "height": 8, "width": 32}, "its size cannot change"),
        ({"prompt": "one", "num_frames": 2, "image_guidance_scale": 2.0}, "give image=, or leave it at 1"),
        ({"prompt": "one", "num_frames": 2, "negative_prompt": "a", "guidance_scale": 1.0}, "only through guidance"),
    ],
)
def test_bad_videos_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.video(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"messages": "hello"}, "must be a list of messages, .* got 'hello'"),
        ({"messages": []}, r"must be a list of messages, .* got \[\]"),
        ({"sampling": ImageSampling(image_guidance_scale=2.0)}, "chat has no image_guidance_scale"),
        ({"guidance_scale": 2.0}, r"not written with guidance_scale: .* sampling=ImageSampling"),
        ({"num_beams": 3}, "not written with num_beams"),
        ({"do_sample": True, "temperature": -1.0}, "temperature must be a number from 0, got -1.0"),
    ],
)
def test_bad_chats_are_refused(pipe, arguments, message):
    asked = [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}]
    with pytest.raises(ValueError, match=message):
        pipe.chat(**({"messages": asked} | arguments))


def test_a_chat_goes_on_after_an_empty_answer(pipe):
    asked = {"role": "user", "content": [{"type": "text", "text": "a red circle"}]}
    answer, reason = pipe.chat([asked], max_images=0, max_new_tokens=0, return_finish_reasons=True)
    assert answer == {"role": "assistant", "content": [{"type": "text", "text": ""}]} and reason == "length"
    again, reasons = pipe.chat([[asked, answer, asked]] * 2, max_images=0, max_new_tokens=2, return_finish_reasons=True)
    assert [len(message["content"]) for message in again] == [1, 1] and reasons == ["length"] * 2


@pytest.mark.parametrize(
    "images, texts, message",
    [
        (make_image(), "one", "score takes lists"),
        ([make_image()], ["one", "two"], "1 images came with 2 prompts"),
        ([make_image()], [""], "Prompt 0 is empty"),
        ([[make_image(), make_image()], make_image()], ["one", "two"], "2 prompts came with 3 images in lists"),
    ],
)
def test_bad_pairs_are_not_scored(pipe, images, texts, message):
    with pytest.raises(ValueError, match=message):
        pipe.score(images, texts)


def test_a_first_frame_is_brought_to_the_videos_size(pipe, tmp_path):
    first = Image.new("RGB", (100, 25), "red")
    video = pipe.video("a star", image=first, num_frames=3, **GREEDY)
    assert {frame.size for frame in video.frames[0]} == {(32, 8)}
    assert np.array_equal(np.asarray(video.frames[0][0]), np.asarray(Image.new("RGB", (32, 8), "red")))
    write_frames(video.frames[0], tmp_path / "video.gif")


def test_the_side_that_is_left_open_is_the_images(pipe):
    assert pipe("a star", image=make_image(size=(32, 8)), height=8, **GREEDY).images[0].size == (32, 8)


def test_videos_that_cannot_be_read_or_written_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one size"):
        read_frames([make_image(), make_image(size=(32, 8))])
    with pytest.raises(ValueError, match="at least one frame"):
        read_frames([])
    with pytest.raises(ValueError, match="There is no video"):
        read_frames(tmp_path / "video.gif")
    (tmp_path / "video.gif").write_bytes(b"GIF89a broken")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_frames(tmp_path / "video.gif")
    with pytest.raises(ValueError, match="written as .gif or .mp4"):
        write_frames([make_image()], tmp_path / "video.avi")


def test_scores_need_as_many_images_as_prompts(pipe):
    with pytest.raises(ValueError, match="1 images came with 2 prompts"):
        pipe.score([make_image()], ["one", "two"])
