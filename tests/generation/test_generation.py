"""Drawing scale by scale against one teacher-forced pass, batches against single images, text after images."""

import pytest
import torch
from reference_nextflow import ReferenceImage, as_batch, code_targets, filtered_probabilities, rope_positions
from test_modeling import ATTENTIONS, LEVELS, attention, random_image, special_tokens
from tiny import tiny_model
from transformers import GenerationConfig

from transformers_nextflow import ImageSampling
from transformers_nextflow.generation import sampling as sampling_nextflow
from transformers_nextflow.generation.sampling import sample_codes, truncate_logits


RATIOS = [(16, 16), (8, 32), (20, 12)]


def prompts(config, rows):
    """Rows that end with `<boi>`, padded on the left, as `generate_images` takes them."""
    return as_batch([[*row, config.boi_token_id] for row in rows], *special_tokens(config))[1]


def mixed_prompts(config):
    """Text before, between and after images; different lengths."""
    return [
        [20, 21, random_image(config, seed=1), 22, random_image(config, (12, 20), seed=2), 23],
        [24],
        [random_image(config, (32, 8), seed=3)],
    ]


def negative(inputs):
    return {"negative_" + name: inputs[name] for name in ("input_ids", "attention_mask")}


def schedules_of(config, ratios, levels=None):
    levels = levels or [None] * len(ratios)
    return [config.vq_config.scale_schedules.build(ratio, level) for ratio, level in zip(ratios, levels)]


def draw(model, schedules, inputs, seed=0, **kwargs):
    """The output and the logits of each scale, of each image: [image][scale] (h*w, codes)."""
    logits = [[] for _ in schedules]

    def record(_, scale, state):
        for row, schedule in enumerate(schedules):
            if scale < schedule.num_scales:
                logits[row].append(state.logits[row, : schedule.tokens_per_scale[scale]])

    sizes = [schedule.image_size(4) for schedule in schedules]
    kwargs.setdefault("generator", [torch.Generator().manual_seed(seed + n) for n in range(len(schedules))])
    output = model.generate_images(**inputs, image_sizes=sizes, callback=record, **kwargs)
    return output, logits


def teacher_forced_logits(model, rows, schedules, image_tokens):
    """Logits (N, codes) at the positions that predict the codes of the last image of each row, from one pass."""
    config = model.config
    images = [
        ReferenceImage(list(schedule.grids), tokens[: schedule.num_tokens].tolist())
        for schedule, tokens in zip(schedules, image_tokens)
    ]
    laid_out, inputs = as_batch([[*row, p] for row, p in zip(rows, images)], *special_tokens(config))
    logits = model(**inputs).logits[..., config.text_config.vocab_size :]
    return [
        logits[b, [n for n, _, _, image in code_targets(row) if image is images[b]]] for b, row in enumerate(laid_out)
    ]


@pytest.mark.parametrize("implementation", ATTENTIONS)
@pytest.mark.parametrize(
    "options, guidance, levels",
    [
        ({}, {}, None),
        ({}, {"guidance_scale": 3.0}, None),
        ({}, {"guidance_scale": 3.0, "guidance_ramp": True, "num_unguided_scales": 1}, None),
        ({"read_last_scale": True}, {"guidance_scale": (1.0, 2.0, 1.0, 0.0)}, None),
        ({"accumulate_features": True}, {"guidance_scale": 2.0, "num_unguided_scales": 3}, None),
        ({"vq_config": LEVELS}, {"guidance_scale": 2.0}, [8, 16, 16]),
    ],
    ids=["plain", "guided", "ramp", "read last", "accumulated", "levels"],
)
def test_scale_by_scale_equals_one_teacher_forced_pass(implementation, options, guidance, levels):
    model = tiny_model(**options)
    model.set_attn_implementation(implementation)
    rows, negatives = mixed_prompts(model.config), [[], [30, 31], [32]]
    schedules = schedules_of(model.config, RATIOS, levels)
    inputs = prompts(model.config, rows)
    if guidance:
        inputs |= negative(prompts(model.config, negatives))
    expected_guidance = slow_guidance(**guidance)
    sampling = ImageSampling(top_k=20, **guidance)
    with torch.no_grad(), attention(implementation):
        output, logits = draw(model, schedules, inputs, sampling=sampling)
        conditional = teacher_forced_logits(model, rows, schedules, output.image_tokens)
        unconditional = teacher_forced_logits(model, negatives, schedules, output.image_tokens)
    for row, schedule in enumerate(schedules):
        for scale in range(schedule.num_scales):
            part = slice(schedule.offsets[scale], schedule.offsets[scale + 1])
            weight = expected_guidance[scale]
            expected = (1 - weight) * unconditional[row][part] + weight * conditional[row][part]
            torch.testing.assert_close(logits[row][scale], expected, atol=2e-5, rtol=0)
    assert output.image_grids.tolist() == [list(schedule.final_grid) for schedule in schedules]
    for tokens, schedule in zip(output.image_tokens, schedules):
        assert (tokens >= 0).sum() == schedule.num_tokens and (tokens[schedule.num_tokens :] == -1).all()


def slow_guidance(guidance_scale=1.0, guidance_ramp=False, num_unguided_scales=0, num_scales=4):
    values = list(guidance_scale) if isinstance(guidance_scale, tuple) else [guidance_scale] * num_scales
    guided = num_scales - num_unguided_scales
    if guidance_ramp:
        values = [1 + (value - 1) * k / (guided - 1) for k, value in enumerate(values)]
    return values[:guided] + [1.0] * num_unguided_scales


@pytest.mark.parametrize("implementation", ATTENTIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.8, "temperature": (2.0, 1.0, 1.0, 0.5)},
        {"top_k": 10, "guidance_scale": 3.0, "guidance_ramp": True, "num_unguided_scales": 1},
    ],
    ids=["plain", "guided"],
)
def test_batch_equals_single_images(implementation, settings):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    check_batch_equals_single(model, implementation, schedules_of(model.config, RATIOS), settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 3.0, "num_unguided_scales": 1},
        {"guidance_scale": 3.0, "guidance_ramp": True},
    ],
    ids=["plain", "unguided last scales", "ramp"],
)
def test_images_of_different_levels_in_a_batch_equal_single_ones(settings):
    model = tiny_model(vq_config=LEVELS)
    schedules = schedules_of(model.config, RATIOS, [16, 8, 16])
    check_batch_equals_single(model, "sdpa", schedules, settings)


def test_guidance_of_different_levels_in_bfloat16():
    model = tiny_model(vq_config=LEVELS).to(torch.bfloat16)
    schedules = schedules_of(model.config, RATIOS, [16, 8, 16])
    inputs = prompts(model.config, mixed_prompts(model.config)) | negative(prompts(model.config, [[], [30, 31], [32]]))
    output, logits = draw(model, schedules, inputs, sampling=ImageSampling(guidance_scale=3.0))
    for row, schedule in enumerate(schedules):
        assert (output.image_tokens[row] >= 0).sum() == schedule.num_tokens
        assert all(part.dtype == torch.float32 for part in logits[row])


def test_a_cast_of_the_model_leaves_codebooks_in_float32():
    model = tiny_model()
    codebook = model.vq_model.quantizer.codebook.clone()
    model.to(torch.bfloat16).half()
    assert {p.dtype for p in model.vq_model.quantizer.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.float16
    assert torch.equal(model.vq_model.quantizer.codebook, codebook)


def check_batch_equals_single(model, implementation, schedules, settings):
    rows, negatives = mixed_prompts(model.config), [[], [30, 31], [32]]
    sampling = ImageSampling(**settings)
    guided = "guidance_scale" in settings

    def run(order):
        inputs = prompts(model.config, [rows[n] for n in order])
        if guided:
            inputs |= negative(prompts(model.config, [negatives[n] for n in order]))
        generators = [torch.Generator().manual_seed(n) for n in order]
        return draw(model, [schedules[n] for n in order], inputs, sampling=sampling, generator=generators)

    with attention(implementation):
        together, logits_together = run([2, 0, 1])
        for place, n in enumerate([2, 0, 1]):
            alone, logits_alone = run([n])
            for one, other in zip(logits_alone[0], logits_together[place]):
                torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
            assert torch.equal(alone.image_tokens[0], together.image_tokens[place][: schedules[n].num_tokens])


def test_images_follow_their_own_seed_and_greedy_ones_need_none():
    model = tiny_model()
    schedules = schedules_of(model.config, [(16, 16)] * 3)
    inputs = prompts(model.config, [[20, 21]] * 3)

    def run(seeds, **settings):
        generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
        return draw(model, schedules, inputs, generator=generators, sampling=ImageSampling(**settings))[0].image_tokens

    first, second, third = run([1, 2, 1])
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert torch.equal(run([2, 1, 1])[0], second)
    greedy = run(None, temperature=0)
    assert torch.equal(greedy, run([1, 2, 3], top_k=1)) and torch.equal(greedy, run([1, 2, 3], top_p=1e-6))
    _, logits = draw(model, schedules, inputs, sampling=ImageSampling(temperature=0))
    assert torch.equal(greedy[0], torch.cat(logits[0]).argmax(-1))
    shared = [
        draw(model, schedules, inputs, generator=torch.Generator().manual_seed(5))[0].image_tokens for _ in range(2)
    ]
    assert torch.equal(*shared) and not torch.equal(shared[0][0], shared[0][1])


@pytest.mark.filterwarnings("ignore:There is no eos_token_id")
def test_checkpoint_brings_its_own_sampling(tmp_path):
    model = tiny_model()
    inputs, schedules = prompts(model.config, [[20, 21]]), schedules_of(model.config, [(16, 16)])
    settings = ImageSampling(top_k=3, temperature=[1.0, 0.9, 0.8, 0.7])
    model.generation_config = GenerationConfig(image_sampling=settings.to_dict())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    expected = draw(model, schedules, inputs, sampling=settings)[0].image_tokens
    assert torch.equal(draw(loaded, schedules, inputs)[0].image_tokens, expected)
    assert not torch.equal(draw(loaded, schedules, inputs, sampling=ImageSampling())[0].image_tokens, expected)


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.6, "temperature": 2.0}, {"top_k": 99}]
)
def test_truncated_probabilities_equal_the_reference(settings):
    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)) * 2
    expected = torch.tensor([filtered_probabilities(row, **settings) for row in logits])
    options = dict(settings)
    temperature = options.pop("temperature", 1.0)
    torch.testing.assert_close(truncate_logits(logits / temperature, **options).softmax(-1), expected)
    many = logits[:1].expand(20000, -1)
    codes = sample_codes(many, **settings, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(torch.bincount(codes, minlength=12) / 20000, expected[0], atol=0.015)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24], ids=["smallest", "largest"])
def test_every_random_number_samples_a_code_that_is_allowed(number, monkeypatch):
    monkeypatch.setattr(sampling_nextflow, "_random_numbers", lambda shape, *_: torch.full(shape, number))
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    for settings in ({"top_k": 3}, {"top_p": 0.5}, {"top_k": 500, "top_p": 0.9}):
        codes = sample_codes(logits, **settings)
        assert truncate_logits(logits, **settings).gather(-1, codes[:, None]).isfinite().all()


def test_codes_that_reach_top_p_exactly_are_enough():
    assert truncate_logits(torch.zeros(4), top_p=0.5).isfinite().sum() == 2
    assert truncate_logits(torch.zeros(4), top_p=0.51).isfinite().sum() == 3


def test_callback_sees_previews_that_end_in_the_image():
    model = tiny_model()
    inputs, schedules = prompts(model.config, [[20], [21, 22]]), schedules_of(model.config, RATIOS[:2])
    sizes, previews = [schedule.image_size(4) for schedule in schedules], []

    def keep(caller, scale, state):
        assert caller is model and scale == len(previews) and state.schedules == schedules
        assert [len(codes) for codes in state.image_tokens] == [schedule.offsets[scale + 1] for schedule in schedules]
        previews.append(state.preview())

    output = model.generate_images(**inputs, image_sizes=sizes, callback=keep)
    images = model.decode_image_tokens(output.image_tokens, output.image_grids)
    assert len(previews) == 4
    for preview in previews:
        assert [tuple(pixels.shape) for pixels in preview] == [(3, *size) for size in sizes]
    for preview, image in zip(previews[-1], images):
        assert torch.equal(preview, image)
    assert not torch.equal(previews[0][0], images[0])


def test_callback_can_stop_the_drawing():
    model = tiny_model()
    inputs, schedules = prompts(model.config, [[20], [21, 22]]), schedules_of(model.config, RATIOS[:2])
    calls = []

    def stop(_, scale, state):
        calls.append(state)
        return scale < 1

    sizes = [schedule.image_size(4) for schedule in schedules]
    output = model.generate_images(**inputs, image_sizes=sizes, callback=stop)
    assert len(calls) == 2
    assert (output.image_tokens >= 0).sum(1).tolist() == [schedule.offsets[2] for schedule in schedules]
    images = model.decode_image_tokens(output.image_tokens, output.image_grids)
    assert all(torch.equal(*pair) for pair in zip(images, calls[-1].preview()))


def test_given_first_scales_are_kept_and_the_others_drawn_after_them():
    model = tiny_model()
    inputs, schedules = prompts(model.config, mixed_prompts(model.config)), schedules_of(model.config, RATIOS)
    greedy = ImageSampling(temperature=0)
    drawn = draw(model, schedules, inputs, sampling=greedy)[0].image_tokens
    # Other codes than the model's own, of as many scales in every row.
    ends = [schedule.offsets[3] for schedule in schedules]
    given = torch.full((3, max(ends)), -1)
    for row, (codes, end) in enumerate(zip(drawn, ends)):
        given[row, :end] = (codes[:end] + 1) % 32
    changed, logits = draw(model, schedules, inputs, sampling=greedy, given_image_tokens=given)
    expected = teacher_forced_logits(model, mixed_prompts(model.config), schedules, changed.image_tokens)
    for row, end in enumerate(ends):
        assert torch.equal(changed.image_tokens[row, :end], given[row, :end])
        torch.testing.assert_close(torch.cat(logits[row]), expected[row], atol=2e-5, rtol=0)
    same = draw(model, schedules, inputs, sampling=greedy, given_image_tokens=drawn[:, :1])[0].image_tokens
    assert torch.equal(same, drawn)


@pytest.mark.parametrize("ratios", [RATIOS, RATIOS[:1] * 3], ids=["different sizes", "one size"])
def test_images_may_have_different_numbers_of_given_scales(ratios):
    model = tiny_model()
    rows, schedules = mixed_prompts(model.config), schedules_of(model.config, ratios)
    given = torch.full((3, max(schedule.offsets[3] for schedule in schedules)), -1)
    for row, count in enumerate((3, 1, 0)):
        given[row, : schedules[row].offsets[count]] = row + 5

    def run(order):
        generator = [torch.Generator().manual_seed(n) for n in order]
        inputs = prompts(model.config, [rows[n] for n in order])
        own = [schedules[n] for n in order]
        return draw(model, own, inputs, generator=generator, given_image_tokens=given[order])[0].image_tokens

    together = run([0, 1, 2])
    for row, schedule in enumerate(schedules):
        assert torch.equal(run([row])[0], together[row, : schedule.num_tokens])
        kept = given[row] >= 0
        assert torch.equal(together[row, : given.shape[1]][kept], given[row][kept])


@pytest.mark.parametrize("given", [[1, 2, 3], [-1, 2, 3, 4, 5]])
def test_given_codes_that_fill_no_whole_scales_are_refused(given):
    model = tiny_model()
    inputs = prompts(model.config, [[20]])
    with pytest.raises(ValueError, match=r"image 0 hold \d codes, which do not fill its first scales"):
        model.generate_images(**inputs, image_sizes=[(16, 16)], given_image_tokens=torch.tensor([given]))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0 .*got -1.0"),
        ({"guidance_scale": (2.0, -0.5)}, "guidance_scale must be at least 0"),
        ({"top_k": 0}, "top_k must be a whole number from 1, or None for all codes, got 0"),
        ({"top_k": 2.5}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"num_unguided_scales": -1}, "num_unguided_scales must be"),
        ({"guidance_scale": (1.0, 2.0), "guidance_ramp": True}, "guidance_ramp goes with a single"),
        *(({name: 10**400}, name) for name in ("guidance_scale", "top_k", "num_unguided_scales", "temperature")),
    ],
)
def test_sampling_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageSampling(**settings)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_sizes": [(16, 16)]}, "2 prompts came with 1 image_sizes"),
        ({"image_sizes": [(16, 16), (16, 18)]}, "16x18 is not a multiple of 4; the nearest"),
        ({"image_sizes": [(16, 16), (8, 72)]}, "outside 1:4 to 4:1"),
        ({"generator": [torch.Generator()]}, "1 generators came with a batch of 2"),
        ({"generator": [torch.Generator()] * 2}, "the same torch.Generator more than once"),
        ({"input_ids": torch.tensor([[20, 21], [20, 3]])}, "must end with <boi>"),
        ({"sampling": ImageSampling(guidance_scale=2.0)}, "Guidance needs negative_input_ids"),
        ({"sampling": ImageSampling(top_k=(5, 5))}, "top_k gives 2 values, but the image is drawn in 4 scales"),
        (
            {"sampling": ImageSampling(guidance_scale=2.0), "negative_input_ids": torch.tensor([[3]])},
            "2 prompts came with 1 negative_input_ids",
        ),
        (
            {"sampling": ImageSampling(guidance_scale=2.0), "negative_input_ids": torch.tensor([[3, 20], [3, 20]])},
            "negative_input_ids must end with <boi>",
        ),
        ({"image_grids": torch.tensor([[4, 4]]), "image_tokens": torch.zeros(1, 30).long()}, "0 whole images"),
        ({"image_sizes": []}, "2 prompts came with 0 image_sizes"),
        ({"given_image_tokens": torch.zeros(1, 1).long()}, "2 prompts came with 1 rows of given_image_tokens"),
        ({"given_image_tokens": torch.full((2, 1), 999)}, "given_image_tokens go from 999 to 999; codes are below"),
    ],
)
def test_drawing_with_inputs_that_do_not_fit_is_refused(change, message):
    model = tiny_model()
    inputs = {"input_ids": torch.tensor([[20, 3], [21, 3]]), "image_sizes": [(16, 16), (16, 16)]}
    with pytest.raises(ValueError, match=message):
        model.generate_images(**inputs | change)


def test_negative_prompts_hold_all_images_or_none():
    model = tiny_model()
    image = random_image(model.config)
    schedules = schedules_of(model.config, [(16, 16)])
    inputs = prompts(model.config, [[20, image, image]])
    sampling = ImageSampling(guidance_scale=2.0)
    for count in (0, 2):
        negatives = negative(prompts(model.config, [[21] + [image] * count]))
        output, logits = draw(model, schedules, inputs | negatives, sampling=sampling)
        halves = [
            teacher_forced_logits(model, [row], schedules, output.image_tokens)[0]
            for row in ([20, image, image], [21] + [image] * count)
        ]
        torch.testing.assert_close(torch.cat(logits[0]), 2 * halves[0] - halves[1], atol=5e-5, rtol=0)
    with pytest.raises(ValueError, match="hold the 2 images of the prompts, or none; got 1"):
        draw(model, schedules, inputs | negative(prompts(model.config, [[21, image]])), sampling=sampling)


def text_rows(config):
    return [
        [20, random_image(config, seed=1), 21, 22],
        [23, random_image(config, (8, 32), seed=2), random_image(config, (20, 12), seed=3), 24],
        [25, 26, 27],
    ]


def silence(logits, config):
    """Logits of the text tokens that may be written."""
    logits = logits[..., : config.text_config.vocab_size].clone()
    logits[..., [config.boi_token_id, config.eoi_token_id, config.image_token_id]] = -torch.inf
    return logits


@torch.no_grad()
def greedy_by_full_passes(model, rows, count):
    """Token by token, each from a pass over everything so far, without a cache."""
    rows = [list(row) for row in rows]
    for _ in range(count):
        _, inputs = as_batch(rows, *special_tokens(model.config))
        for row, logits in zip(rows, silence(model(**inputs).logits[:, -1], model.config)):
            row.append(int(logits.argmax()))
    return torch.tensor([row[-count:] for row in rows])


@pytest.mark.parametrize("implementation", ATTENTIONS)
@pytest.mark.parametrize("read_last_scale", [False, True])
def test_text_after_images_equals_greedy_by_full_passes(implementation, read_last_scale):
    model = tiny_model(read_last_scale=read_last_scale)
    model.set_attn_implementation(implementation)
    rows = text_rows(model.config)
    _, inputs = as_batch(rows, *special_tokens(model.config))
    with attention(implementation):
        expected = greedy_by_full_passes(model, rows, 5)
        written = model.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(written[:, inputs["input_ids"].shape[1] :], expected)


def test_text_never_holds_codes_or_the_tokens_around_images():
    model = tiny_model(initializer_range=0.02)
    _, inputs = as_batch(text_rows(model.config), *special_tokens(model.config))
    torch.manual_seed(0)
    written = model.generate(
        **inputs, do_sample=True, top_k=0, max_new_tokens=60, num_return_sequences=8, eos_token_id=None
    )[:, inputs["input_ids"].shape[1] :]
    assert written.max() < model.config.text_config.vocab_size
    assert not torch.isin(written, torch.tensor([3, 4, 5])).any()
    assert len(written.unique()) > 200


def test_text_after_pixels_equals_text_after_their_codes():
    model = tiny_model()
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    codes = model.get_image_tokens(pixels, torch.tensor([[4, 4]]))
    image = ReferenceImage(random_image(model.config).grids, codes[0].tolist())
    _, inputs = as_batch([[20, image, 21]], *special_tokens(model.config))
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    from_codes = model.generate(**inputs, **options)
    inputs.pop("image_tokens")
    assert torch.equal(model.generate(**inputs, pixel_values=pixels, **options), from_codes)


def test_text_without_a_cache_is_that_with_one():
    model = tiny_model()
    _, inputs = as_batch(text_rows(model.config), *special_tokens(model.config))
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), model.generate(**inputs, **options))


def test_a_pass_gives_a_tuple_where_it_is_asked_for_one_and_wants_one_kind_of_input():
    model = tiny_model()
    with torch.no_grad():
        (logits, *_) = model(input_ids=torch.tensor([[20, 21]]), return_dict=False)
    assert torch.equal(logits, model(input_ids=torch.tensor([[20, 21]])).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=torch.tensor([[20]]), inputs_embeds=torch.zeros(1, 1, 8))


def test_beams_and_several_answers_keep_each_rows_own_images():
    model = tiny_model()
    rows = text_rows(model.config)
    _, inputs = as_batch(rows, *special_tokens(model.config))
    length, options = inputs["input_ids"].shape[1], {"max_new_tokens": 4, "eos_token_id": None}
    greedy = greedy_by_full_passes(model, rows, 4)
    several = model.generate(**inputs, **options, do_sample=True, top_k=1, num_return_sequences=2)[:, length:]
    assert torch.equal(several, greedy.repeat_interleave(2, 0))

    beams = model.generate(
        **inputs,
        **options,
        num_beams=3,
        num_return_sequences=2,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    answers = [[*rows[n // 2], *beams.sequences[n, length:].tolist()] for n in range(6)]
    _, inputs = as_batch(answers, *special_tokens(model.config))
    with torch.no_grad():
        log_probabilities = model(**inputs).logits[:, -5:-1].log_softmax(-1)
    chosen = log_probabilities.gather(-1, inputs["input_ids"][:, -4:, None]).sum((1, 2))
    torch.testing.assert_close(beams.sequences_scores, chosen, atol=1e-4, rtol=0)


@pytest.mark.parametrize("with_image", [False, True])
def test_text_goes_on_from_the_cache_of_an_earlier_answer(with_image):
    model = tiny_model()
    rows = text_rows(model.config)
    _, inputs = as_batch(rows, *special_tokens(model.config))
    length, options = inputs["input_ids"].shape[1], {"do_sample": False, "eos_token_id": None}
    first = model.generate(**inputs, **options, return_dict_in_generate=True, max_new_tokens=3)
    question = [40, random_image(model.config, seed=9), 41] if with_image else [40, 41]
    longer = [[*row, *answer, *question] for row, answer in zip(rows, first.sequences[:, length:].tolist())]
    _, inputs = as_batch(longer, *special_tokens(model.config))
    second = model.generate(**inputs, **options, past_key_values=first.past_key_values, max_new_tokens=4)
    assert torch.equal(second[:, -4:], greedy_by_full_passes(model, longer, 4))
    # Where a sequence goes on after images cannot be told from its last tokens alone.
    with pytest.raises(ValueError, match="whole sequence"):
        model.generate(torch.tensor([[42]] * 3), past_key_values=first.past_key_values, max_new_tokens=1)


def test_a_pass_on_the_cache_equals_the_whole_pass_where_it_is_told_the_positions():
    model = tiny_model()
    rows = text_rows(model.config)
    laid_out, inputs = as_batch([[*row, 40, 41] for row in rows], *special_tokens(model.config))
    with torch.no_grad():
        whole = model(**inputs).logits[:, -2:]
        start = dict(inputs, input_ids=inputs["input_ids"][:, :-2], attention_mask=inputs["attention_mask"][:, :-2])
        cache = model(**start, use_cache=True).past_key_values
        rest = {"input_ids": inputs["input_ids"][:, -2:], "attention_mask": inputs["attention_mask"]}
        # The cache does not tell how many positions its images took.
        with pytest.raises(ValueError, match="position_ids"):
            model(**rest, past_key_values=cache)
        positions = torch.stack([rope_positions(row, model.config.rope_range) for row in laid_out], dim=1)[..., -2:]
        logits = model(**rest, past_key_values=cache, position_ids=positions).logits
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)
