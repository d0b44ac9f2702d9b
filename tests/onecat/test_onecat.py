"""OneCAT: passes and drawings against a reference without a cache, batches, tokenizer, processor, errors."""

from dataclasses import replace

import numpy as np
import pytest
import reference_onecat as reference
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tiny_onecat import FIRST, LEVELS, TOKENS, tiny_onecat_config, tiny_onecat_model, tiny_onecat_processor

from transformers_nextflow import (
    BitwiseEditingSampling,
    BitwiseImageSampling,
    ImageSampling,
    NextFlowPipeline,
    OneCatProcessor,
)
from transformers_nextflow.onecat.backbone import rotary_frequencies
from transformers_nextflow.onecat.generation_onecat import sample_bits
from transformers_nextflow.onecat.image_processing_onecat import size_of_chat, size_of_reference
from transformers_nextflow.onecat.schedules import LEVELS as ALL_LEVELS
from transformers_nextflow.onecat.schedules import RATIOS, OneCatSchedules, cell_positions


PROMPTS = ["a red circle", "two blue squares"]
SIZES = [(64, 64), (48, 32)]
RED, WIDE = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (60, 30), "blue")
QUESTION = [{"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "what?"}]}]
ANSWER = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unpadded(inputs, prefix=""):
    ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]


def inputs_of(processor, prompts=PROMPTS, images=None, sizes=SIZES, sampling=None):
    schedules = [processor.image_processor.scale_schedules.for_size(*size) for size in sizes]
    default = BitwiseImageSampling(guidance_scale=2.0) if images is None else BitwiseEditingSampling(guidance_scale=2.0)
    contexts = (sampling or default).contexts([3])
    inputs = processor.drawing_inputs(prompts, [""] * len(prompts), images, contexts, schedules)
    return inputs | {"image_sizes": sizes}


def bits_of(model, tokens, schedule):
    return [model.vq_model.quantizer.to_bits(codes.flatten(-2)) for codes in schedule.split(tokens)]


# --- schedules ---


def test_positions_round_in_float32_as_the_model_was_trained():
    schedules = OneCatSchedules(levels=tuple(ALL_LEVELS.items()))
    tall = schedules.build(1.25, 512)
    rows = cell_positions(tall, tall.num_scales - 1)[0]
    assert rows.max() == tall.final_grid[0] - 1
    # 31.5 and 55.5 by exact numbers; float32 lies below the first and on the second.
    scale = [grid[0] for grid in tall.grids].index(30)
    assert cell_positions(tall, scale)[0].unique()[27] == 31 or tall.final_grid[0] != 35
    longest = schedules.build(3.0, 1024)
    scale = [grid[0] for grid in longest.grids].index(54)
    assert cell_positions(longest, scale)[0].unique()[27] == 56


def test_the_nearest_ratio_is_the_first_of_the_least_difference_and_all_sizes_are_drawn():
    schedules = OneCatSchedules()
    assert schedules.nearest(1024, 1024).num_tokens == 10521 and schedules.nearest(512, 512).num_tokens == 2521
    assert schedules.nearest(147 * 8, 800, 1024).final_grid == (78, 52)
    assert schedules.nearest(9, 8, 512).final_grid == (32, 32)  # 1.125 lies between 1 and 1.25
    assert len(schedules.all_sizes()) == 2 * len(RATIOS)
    for size in schedules.all_sizes():
        assert schedules.for_size(*size).image_size(16) == size
    with pytest.raises(ValueError, match="nearest that is: 1024x1024"):
        schedules.for_size(1000, 1024)


# --- the model against the reference ---


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
def test_one_pass_over_mixed_sizes_equals_the_reference(model, processor, released, implementation):
    if implementation:
        model = tiny_onecat_model()
        model.set_attn_implementation(implementation)
    inputs = processor.apply_image_prompt(PROMPTS)
    schedules = [model.config.vq_config.scale_schedules.for_size(*size) for size in SIZES]
    tokens = torch.full((2, schedules[0].num_tokens), -1)
    for row, schedule in enumerate(schedules):
        tokens[row, : schedule.num_tokens] = torch.randint(256, (schedule.num_tokens,), generator=seeded(row))
    grids = torch.tensor([schedule.final_grid for schedule in schedules])
    with torch.no_grad():
        logits = model(**inputs, image_tokens=tokens, image_grids=grids).bit_logits
    for row, (ids, schedule) in enumerate(zip(unpadded(inputs), schedules)):
        bits = bits_of(model, tokens[row, : schedule.num_tokens], schedule)
        for scale, (start, stop) in enumerate(zip(schedule.offsets, schedule.offsets[1:])):
            expected = reference.bit_logits(released, model.config, ids, schedule, bits, scale)
            torch.testing.assert_close(logits[row, start:stop], expected, atol=2e-4, rtol=0)


def test_drawing_on_the_cache_equals_the_reference_that_reads_all_anew(model, processor, released):
    inputs, logits = inputs_of(processor), []
    sampling = BitwiseImageSampling(guidance_scale=3.0, temperature=0)
    drawn = model.generate_images(**inputs, sampling=sampling, callback=lambda m, k, state: logits.append(state.logits))
    for row, prompts in enumerate(zip(unpadded(inputs), unpadded(inputs, "negative_"))):
        schedule = model.config.vq_config.scale_schedules.for_size(*SIZES[row])
        bits, expected = reference.drawing(released, model.config, prompts, schedule, lambda c, u: 3 * c - 2 * u)
        found = bits_of(model, drawn.image_tokens[row, : schedule.num_tokens], schedule)
        for scale in range(schedule.num_scales):
            own = logits[scale][row, : schedule.tokens_per_scale[scale]].unflatten(-1, (-1, 2))
            torch.testing.assert_close(own, expected[scale], atol=5e-4, rtol=0)
            assert torch.equal(found[scale], bits[scale])


def test_edits_guide_as_the_original_mixes_its_three_passes(model, processor, released, monkeypatch):
    images, cfg_text, cfg_image = [[RED], [WIDE]], 3.0, 1.5
    monkeypatch.setattr("transformers_nextflow.onecat.image_processing_onecat.REFERENCE_SIDES", {64: 56})
    monkeypatch.setattr("transformers_nextflow.onecat.image_processing_onecat.MIN_PIXELS", 0)
    inputs = inputs_of(processor, images=images)
    sampling = BitwiseEditingSampling(
        guidance_scale=cfg_text, image_guidance_scale=cfg_text / (1 + cfg_image), temperature=0
    )
    drawn = model.generate_images(**inputs, sampling=sampling)
    rows = zip(*(unpadded(inputs, prefix) for prefix in ("", "negative_", "unconditional_")))
    for row, prompts in enumerate(rows):
        schedule = model.config.vq_config.scale_schedules.for_size(*SIZES[row])
        height, width = inputs["pixel_sizes"][row].tolist()

        def guide(c, n, e):
            return e + cfg_text * ((c + cfg_image * n) / (1 + cfg_image) - e)

        bits, _ = reference.drawing(
            released, model.config, prompts, schedule, guide, [inputs["pixel_values"][row, :, :height, :width]]
        )
        found = bits_of(model, drawn.image_tokens[row, : schedule.num_tokens], schedule)
        assert all(torch.equal(own, other) for own, other in zip(found, bits))


def test_a_chat_reads_images_as_the_reference_does_and_writes_what_it_predicts(model, processor, released):
    views = [torch.randn(3, 56, 84, generator=seeded()), torch.randn(3, 28, 28, generator=seeded(1))]
    ids = [5, 6, *[model.config.image_token_id] * 7, 8, 9]
    padded = torch.zeros(2, 3, 56, 84)
    padded[0], padded[1, :, :28, :28] = views
    images = {"pixel_values": padded, "pixel_sizes": torch.tensor([[56, 84], [28, 28]])}
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids, **images).logits[0]
    torch.testing.assert_close(logits, reference.text_logits(released, model.config, ids, views), atol=2e-4, rtol=0)
    written = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **images, **ANSWER)[0].tolist()
    for length in range(len(ids), len(written)):
        expected = reference.text_logits(released, model.config, written[:length], views)[-1].argmax()
        assert written[length] == expected


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_answers_do_not_depend_on_the_cache(pipe, options):
    with torch.compiler.set_stance("force_eager"):
        inputs = pipe.processor.apply_chat_template(
            [QUESTION, [{"role": "user", "content": "hello"}]], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt",
        )  # fmt: skip
        assert torch.equal(pipe.model.generate(**inputs, **ANSWER, **options), pipe.model.generate(**inputs, **ANSWER))


def test_more_positions_than_the_model_has_are_refused(processor):
    inputs = inputs_of(processor)
    length = max(inputs["input_ids"].shape[1], inputs["negative_input_ids"].shape[1])
    tiny_onecat_model(text_config={"max_position_embeddings": length + 4}).generate_images(**inputs)
    short = tiny_onecat_model(text_config={"max_position_embeddings": length + 3})
    with pytest.raises(ValueError, match=f"takes {length + 4} positions"):
        short.generate_images(**inputs)
    with pytest.raises(ValueError, match="positions, but the model has"):
        short.generate(torch.ones(1, length).long(), max_new_tokens=4)


def test_rounded_frequencies_change_drawings_and_leave_chats_alone(processor):
    exact, rounded = (tiny_onecat_model(drawing_frequencies=kind) for kind in ("float32", "bfloat16"))
    inputs, ids = inputs_of(processor), torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(exact(ids).logits, rounded(ids).logits)
    seen = [[], []]
    for model, kept in zip((exact, rounded), seen):
        model.generate_images(**inputs, callback=lambda m, k, state, kept=kept: kept.append(state.logits) or k < 0)
    assert not torch.equal(seen[0][0], seen[1][0])
    text = exact.config.text_config
    frequencies = rotary_frequencies(text, "cpu")
    assert len(frequencies) == 8 and frequencies[0] == 1 and frequencies.dtype == torch.float32


# --- batches, seeds, samples ---


@pytest.mark.parametrize("images", [None, [[RED], [WIDE]]], ids=["draw", "edit"])
def test_batch_equals_single_images_of_mixed_sizes_with_a_seed_each(model, processor, images):
    batch = model.generate_images(**inputs_of(processor, images=images), generator=[seeded(0), seeded(1)])
    for row in range(2):
        single = inputs_of(processor, PROMPTS[row : row + 1], images and images[row : row + 1], SIZES[row : row + 1])
        drawn = model.generate_images(**single, generator=[seeded(row)]).image_tokens[0]
        assert torch.equal(drawn, batch.image_tokens[row, : len(drawn)])


def test_images_of_both_levels_are_drawn_together(model, processor):
    sizes = [(64, 64), (32, 32), (48, 32)]
    prompts, seeds = [*PROMPTS, "one"], range(3)
    batch = model.generate_images(
        **inputs_of(processor, prompts, sizes=sizes), generator=[seeded(seed) for seed in seeds]
    )
    for row in seeds:
        single = inputs_of(processor, prompts[row : row + 1], sizes=sizes[row : row + 1])
        drawn = model.generate_images(**single, generator=[seeded(row)]).image_tokens[0]
        assert torch.equal(drawn, batch.image_tokens[row, : len(drawn)])
        assert (batch.image_tokens[row, len(drawn) :] == -1).all()


def test_bits_are_those_of_multinomial_and_truncated_as_two_classes():
    logits = torch.randn(1, 50, 8, 2, generator=seeded()) * 3
    expected = torch.multinomial(logits.softmax(-1).flatten(0, -2), 1, replacement=True, generator=seeded(5))
    assert torch.equal(sample_bits(logits, generator=seeded(5)).flatten(), expected.flatten())
    kept = sample_bits(logits, top_p=0.97, generator=seeded(5))
    likely = logits.softmax(-1).amax(-1) >= 0.97
    assert likely.any() and torch.equal(kept[likely], logits.argmax(-1)[likely])
    for options in ({"temperature": 0}, {"temperature": 1e-40}, {"top_k": 1}):
        assert torch.equal(sample_bits(logits, **options), logits.argmax(-1))


def test_bits_of_logits_that_are_not_finite_are_refused():
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        sample_bits(logits)


def test_the_callback_stops_given_codes_are_kept_and_previews_decode(model, processor):
    inputs = inputs_of(processor, sizes=[(64, 64)] * 2)
    given = torch.randint(256, (2, 5), generator=seeded())
    drawn = model.generate_images(**inputs, given_image_tokens=given, callback=lambda m, scale, state: scale < 1)
    assert torch.equal(drawn.image_tokens, given)
    preview = model.decode_image_tokens(drawn.image_tokens, drawn.image_grids)
    assert [image.shape for image in preview] == [(3, 64, 64)] * 2


def test_a_large_adapter_acts_on_its_own_scale_only(processor):
    plain, changed = tiny_onecat_model(), tiny_onecat_model()
    rank = plain.config.adapter_rank
    for layer in changed.language_model.layers:
        layer.mlp_ge.up_proj.adapter_in.data[2 * rank : 3 * rank] *= 10
        layer.mlp_ge.up_proj.adapter_in.data[3 * rank :] = torch.nan  # of scales that are not drawn
    seen = [[], []]
    for model, kept in zip((plain, changed), seen):
        model.generate_images(
            **inputs_of(processor),
            callback=lambda m, k, s, kept=kept: kept.append(s.logits) and None,
            generator=[seeded(), seeded()],
        )
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][2], seen[1][2])
    assert seen[1][2].isfinite().all()


# --- the tokenizer ---


def test_codes_come_back_from_bits_and_the_encoder_takes_signs_of_residuals(model):
    vq, pixels = model.vq_model, torch.rand(1, 3, 64, 64, generator=seeded()) * 2 - 1
    tokens, schedule = vq.encode(pixels).image_tokens, vq.schedule_of(pixels)
    assert torch.equal(vq.quantizer.to_tokens(vq.quantizer.to_bits(tokens)), tokens)
    residual, latents = None, vq.encode_latents(pixels)
    residual = latents.clone()
    for codes, grid in zip(schedule.split(tokens), schedule.grids):
        bits = torch.nn.functional.adaptive_avg_pool2d(residual, grid) > 0
        assert torch.equal(vq.quantizer.to_bits(codes), bits.movedim(1, -1).long())
        code = (2.0 * bits - 1) / 8**0.5
        residual = residual - torch.nn.functional.interpolate(code, schedule.final_grid, mode="bilinear")
    torch.testing.assert_close(vq.quantizer.decode(tokens, schedule), latents - residual, atol=1e-5, rtol=0)


def test_codes_of_62_bits_fit_and_others_are_refused():
    quantizer = tiny_onecat_model(vq_config={"code_bits": 62}).vq_model.quantizer
    bits = torch.randint(2, (3, 62), generator=seeded())
    assert torch.equal(quantizer.to_bits(quantizer.to_tokens(bits)), bits)
    with pytest.raises((ValueError, StrictDataclassError), match="from 1 to 62"):
        tiny_onecat_config(vq_config={"code_bits": 63})


# --- the processor ---


def test_prompts_are_the_released_strings(processor):
    system = "<|im_start|>system\n你是一个同时能够支持图像理解、图像生成、图像编辑的多模态大语言模型。<|im_end|>"
    end = "<|im_end|><|im_start|>assistant\n<img_gen>"

    def text(ids):
        return processor.tokenizer.decode(ids)

    ids = unpadded(processor.apply_image_prompt("a cat"))[0]
    assert text(ids) == f"{system}<|im_start|>user\na cat{end}"
    assert ids == processor.tokenizer(f"{system}<|im_start|>user\na cat{end}").input_ids
    assert text(unpadded(processor.apply_image_prompt("", allow_empty=True))[0]) == f"{system}<|im_start|>user\n{end}"
    inputs = inputs_of(processor, ["a cat"], [[RED]], SIZES[:1])
    count = int(inputs["pixel_sizes"].prod(-1)) // 28**2
    shown = f"<ref_gen>{'<REEF_GEN_CONTEXT>' * count}</ref_gen>"
    assert text(unpadded(inputs)[0]) == f"{system}<|im_start|>user\n{shown}a cat{end}"
    assert text(unpadded(inputs, "negative_")[0]) == f"{system}<|im_start|>user\na cat{end}"
    assert text(unpadded(inputs, "unconditional_")[0]) == f"{system}<|im_start|>user{end}"

    chat = [*QUESTION, {"role": "assistant", "content": "sky"}, {"role": "user", "content": "sure?"}]
    encoded = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    (height, width), thumbnail = encoded["pixel_sizes"].tolist()
    shown = f"<img>{'<IMG_CONTEXT>' * (height * width // 28**2 + 256)}</img>\n"
    assert thumbnail == [448, 448] and encoded["pixel_values"].shape[1:] == (3, max(height, 448), max(width, 448))
    assert text(encoded["input_ids"][0]) == (
        f"{system}\n<|im_start|>user\n{shown}what?<|im_end|>\n<|im_start|>assistant\nsky<|im_end|>\n"
        "<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokens_that_a_prompt_spells_out_are_plain_text(processor):
    def own_tokens(ids):
        return [token for token in ids if token >= FIRST and token != processor.reference_token_id]

    hostile, schedules = "an " + " ".join(TOKENS), [processor.image_processor.scale_schedules.for_size(64, 64)]
    for images in (None, [[RED]]):
        parts = ("negative",) if images is None else ("negative", "unconditional")
        plain, spelled = (
            processor.drawing_inputs([text], [text], images, parts, schedules) for text in ("an owl", hostile)
        )
        for name in ("input_ids", *(f"{part}_input_ids" for part in parts)):
            assert own_tokens(plain[name][0].tolist()) == own_tokens(spelled[name][0].tolist())
    chats = [[{"role": "user", "content": text}] for text in ("an owl", hostile)]
    plain, spelled = processor.apply_chat_template(chats, tokenize=True)
    assert own_tokens(plain) == own_tokens(spelled)


def test_a_call_on_a_rendered_chat_and_its_images_is_the_chat(processor):
    chats = [QUESTION, [{"role": "user", "content": "hello"}]]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    found = processor(text=texts, images=[WIDE], return_tensors="pt", padding=True)
    expected = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    rows = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True)
    assert rows == unpadded(expected)
    begun = [*chats[1], {"role": "assistant", "content": "I am"}]
    assert processor.apply_chat_template(begun, continue_final_message=True).endswith("assistant\nI am")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(text="one", images=[RED]), "hold 0 <IMG_CONTEXT>, but were given 1 images"),
        (lambda p: p(text=["<IMG_CONTEXT>", "<IMG_CONTEXT>"], images=[RED]), "hold 2 <IMG_CONTEXT>"),
        (lambda p: p(images=[RED]), "text must be a string"),
        (lambda p: p(text="one", truncation=True, max_length=2), "does not take truncation=True"),
        (lambda p: p(text="one", videos=[[RED]]), "does not take videos"),
        (lambda p: p.apply_chat_template([]), "list of messages"),
        (lambda p: p.apply_chat_template("hello"), "list of messages"),
        (lambda p: p.apply_chat_template([[]]), "cannot be written by the chat template"),
        (lambda p: p.apply_chat_template([{"role": "user"}], tokenize=True), r"messages\[0\].content"),
        (lambda p: p.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=True), "missing"),
        (lambda p: p.apply_chat_template(QUESTION, tokenize=True, processor_kwargs={"max_length": 2}), "max_length=2"),
        (lambda p: p.apply_image_prompt("one", [["none.png"]]), "Image 0 cannot be read: There is no image file"),
        (lambda p: p.apply_image_prompt("one", [[Image.new("RGB", (1, 300))]]), "image of 300x1 pixels"),
    ],
)
def test_what_the_processor_cannot_read_is_refused(processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(processor)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_images_of_edits_may_be_of_any_mode(processor, mode):
    image = Image.fromarray(np.full((20, 30), 40000, np.uint16)) if mode == "I;16" else WIDE.convert(mode)
    read = processor.apply_image_prompt("one", [[image]])
    rgb = processor.apply_image_prompt("one", [processor.image_processor.to_rgb([image])])
    assert image.mode == mode and torch.equal(read["pixel_values"], rgb["pixel_values"])


def test_sizes_of_read_images_are_the_originals():
    examples = {
        (1024, 1024): (1036, 1036), (448, 448): (672, 672), (480, 640): (588, 784), (1080, 1920): (1092, 1932),
        (630, 630): (672, 672), (3000, 4000): (1512, 2044), (100, 2000): (168, 3024), (966, 1022): (952, 1008),
    }  # fmt: skip
    assert {size: size_of_chat(*size) for size in examples} == examples
    assert size_of_reference(720, 1280, 512) == (672, 1204) and size_of_reference(720, 1280, 1024) == (1008, 1792)
    assert size_of_reference(1024, 1024, 512) == (672, 672)
    with pytest.raises(ValueError, match="more elongated than 1:200"):
        size_of_chat(1, 201)


def test_read_images_are_normalised_as_imagenets(processor):
    read = processor.image_processor.read([RED], [(28, 56)])
    expected = (np.array([1, 0, 0]) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    assert np.allclose(read["pixel_values"], expected[:, None, None], atol=1e-5)


def test_a_tokenizer_without_the_models_tokens_is_refused(processor):
    from tiny import tiny_tokenizer

    with pytest.raises(ValueError, match="lacks <img>, .*use the one that was released with OneCAT"):
        OneCatProcessor(processor.image_processor, tiny_tokenizer())


# --- errors ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_sizes": SIZES[:1]}, "2 prompts came with 1 image_sizes"),
        ({"negative_input_ids": None}, "needs negative_input_ids"),
        ({"negative_input_ids": torch.ones(1, 3).long(), "negative_attention_mask": None}, "came with 1 negative"),
        ({"attention_mask": "flipped"}, "padded on the left"),
        ({"region": 1}, "does not take region"),
        ({"given_image_tokens": torch.full((2, 5), 256)}, "go from 256 to 256; codes are below 256"),
        ({"sampling": ImageSampling(image_guidance_scale=2.0)}, "leads towards input images"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, processor, change, message):
    inputs = inputs_of(processor)
    if change.get("attention_mask") == "flipped":
        change = {"attention_mask": inputs["attention_mask"].flip(-1)}
    with pytest.raises(ValueError, match=message):
        model.generate_images(**inputs | change)


def test_images_and_placeholders_that_do_not_match_are_refused(model):
    ids = torch.tensor([[5, model.config.image_token_id, 6]])
    images = {"pixel_values": torch.zeros(1, 3, 28, 56), "pixel_sizes": torch.tensor([[28, 56]])}
    with pytest.raises(ValueError, match="hold 1 placeholders of images; give pixel_values"):
        model(ids)
    with pytest.raises(ValueError, match="hold 1 placeholders of images, but the images have 2"):
        model(ids, **images)
    with pytest.raises(ValueError, match="take as many rows of image_tokens"):
        model(ids, image_tokens=torch.zeros(2, 21).long(), image_grids=torch.tensor([[4, 4]]))
    with pytest.raises(ValueError, match="has 5 codes; all scales of its grid have 21"):
        model(ids[:, ::2], image_tokens=torch.zeros(1, 5).long(), image_grids=torch.tensor([[4, 4]]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config": {"num_attention_heads": 8, "num_key_value_heads": 8}}, "multiple of 8"),
        ({"vq_config": {"levels": [[64, 4]]}}, r"Level \[64, 4\] is none"),
        ({"vq_config": {"levels": "many"}}, "levels"),
        ({"vq_config": {"channels": 20}}, "no multiple of the 32 groups"),
        ({"drawing_frequencies": "float16"}, "must be one of"),
        ({"reader_image_size": 60}, "not a multiple of reader_patch_size"),
        ({"image_token_id": 320}, "outside of the vocabulary"),
        ({"num_scale_embeddings": 12}, "at least 13"),
    ],
)
def test_configurations_that_do_not_fit_together_are_refused(values, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_onecat_config(**values)


def test_a_processor_of_another_model_is_refused(model):
    with pytest.raises(ValueError, match="levels .* Load both from one checkpoint"):
        NextFlowPipeline(model=model, processor=tiny_onecat_processor(levels=LEVELS[:1]))


def test_plain_settings_serve_edits_too(model, processor):
    inputs = inputs_of(processor, images=[[RED], [WIDE]])
    sampling = BitwiseEditingSampling(2.0, 1.5, temperature=0)
    expected = model.generate_images(**inputs, sampling=sampling).image_tokens
    plain = ImageSampling(**sampling.to_dict())
    assert torch.equal(model.generate_images(**inputs, sampling=plain).image_tokens, expected)
    unguided = replace(sampling, guidance_scale=1.0, image_guidance_scale=1.0)
    assert not unguided.contexts([3])
