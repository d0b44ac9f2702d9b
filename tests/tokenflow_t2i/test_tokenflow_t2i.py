"""TokenFlow-t2i: the drawing on a cache against a reference without one, the pipeline, saving, errors."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from reference_tokenflow_t2i import reference_drawing, reference_logits
from tiny_tokenflow_t2i import tiny_t2i_config, tiny_t2i_model, tiny_t2i_processor
from transformers import AutoConfig, AutoModel, AutoProcessor

from transformers_nextflow import (
    ImageSampling,
    NextFlowPipeline,
    RefinedImageSampling,
    TokenFlowT2IConfig,
    TokenFlowT2IForConditionalGeneration,
    TokenFlowT2IProcessor,
)
from transformers_nextflow.conversion.tokenflow import tokenflow_config


PROMPTS = ["a red circle", "two blue squares and a green star"]
NUM_TOKENS = 1 + 4 + 9 + 16


@pytest.fixture(scope="module")
def model():
    return tiny_t2i_model()


@pytest.fixture(scope="module")
def processor():
    return tiny_t2i_processor()


@pytest.fixture(scope="module")
def pipe(model, processor):
    return quiet(NextFlowPipeline(model=model, processor=processor))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def guided_inputs(processor, prompts=PROMPTS, negatives=("", "one")):
    """Inputs of `generate_images`, and the rows of prompts and negative prompts without padding."""
    inputs, empty = processor.apply_image_prompt(prompts), processor.apply_image_prompt(negatives, allow_empty=True)
    rows = [
        [ids[mask.bool()].tolist() for ids, mask in zip(part["input_ids"], part["attention_mask"])]
        for part in (inputs, empty)
    ]
    negative = {"negative_" + name: value for name, value in empty.items()}
    return {**inputs, **negative}, rows


# --- the model ---


@pytest.mark.parametrize("first_position", [0, 100])
def test_one_pass_equals_the_reference_wherever_the_prompt_begins(model, processor, first_position):
    inputs = processor.apply_image_prompt(PROMPTS)
    codes = torch.randint(32, (2, NUM_TOKENS), generator=seeded())
    with torch.no_grad():
        logits = model(**inputs, image_tokens=codes).logits[:, -NUM_TOKENS:]
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"])):
        prompt = ids[mask.bool()].tolist()
        schedule = model.config.schedule
        for scale, (start, stop) in enumerate(zip(schedule.offsets, schedule.offsets[1:])):
            expected = reference_logits(
                model, prompt, codes[row, :start].tolist(), scale + 1, first_position=first_position
            )
            torch.testing.assert_close(logits[row, start:stop], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("refinements", [(), ((5, 0.8), (1, 1.0))], ids=["once", "refined"])
def test_drawing_on_the_cache_equals_the_reference_that_reads_all_anew(processor, implementation, refinements):
    model = tiny_t2i_model()
    model.set_attn_implementation(implementation)
    inputs, rows = guided_inputs(processor)
    sampling = RefinedImageSampling(guidance_scale=1 + 2.5, guidance_ramp=True, temperature=0, refinements=refinements)
    logits = []
    with torch.compiler.set_stance("force_eager"):
        drawn = model.generate_images(
            **inputs, sampling=sampling, callback=lambda model, scale, state: logits.append(state.logits)
        )
    for row, (prompt, negative) in enumerate(zip(*rows)):
        codes, expected = reference_drawing(model, prompt, negative, cfg=2.5, rounds=1 + len(refinements))
        assert drawn.image_tokens[row].tolist() == codes
        for found, other in zip(logits, expected):
            torch.testing.assert_close(found[row], other, atol=5e-4, rtol=0)


def test_refinement_draws_another_image_and_keeps_the_first_scale(model, processor):
    inputs, _ = guided_inputs(processor)
    sampling = RefinedImageSampling(guidance_scale=3.0, top_k=20)
    once, refined = (
        model.generate_images(**inputs, sampling=s, generator=[seeded(0), seeded(1)]).image_tokens
        for s in (sampling, replace(sampling, refinements=((5, 0.8),)))
    )
    assert torch.equal(once[:, 0], refined[:, 0])
    assert not torch.equal(once[:, 1:], refined[:, 1:])


@pytest.mark.parametrize(
    "sampling",
    [
        RefinedImageSampling(refinements=((5, 0.8), (1, 1.0))),
        RefinedImageSampling(guidance_scale=3.0, num_unguided_scales=2, refinements=((5, 0.8),)),
        ImageSampling(guidance_scale=(1.0, 2.0, 1.0, 3.0), top_p=0.9),
    ],
    ids=["unguided", "unguided last scales", "plain settings"],
)
def test_batch_equals_single_images(model, processor, sampling):
    inputs, _ = guided_inputs(processor)
    batch = model.generate_images(**inputs, sampling=sampling, generator=[seeded(0), seeded(1)]).image_tokens
    for row in range(2):
        single, _ = guided_inputs(processor, [PROMPTS[row]], [("", "one")[row]])
        drawn = model.generate_images(**single, sampling=sampling, generator=[seeded(row)]).image_tokens
        assert torch.equal(drawn[0], batch[row])


def test_given_codes_are_kept_and_the_callback_stops(model, processor):
    inputs, _ = guided_inputs(processor)
    given = torch.randint(32, (2, 5), generator=seeded())
    drawn = model.generate_images(**inputs, given_image_tokens=given, callback=lambda model, scale, state: scale < 2)
    assert torch.equal(drawn.image_tokens[:, :5], given)
    assert drawn.image_tokens.shape == (2, 1 + 4 + 9) and (drawn.image_tokens >= 0).all()
    preview = model.decode_image_tokens(drawn.image_tokens, drawn.image_grids)
    assert [image.shape for image in preview] == [(3, 16, 16)] * 2


def test_the_released_rounds_are_settings_of_their_own():
    sampling = RefinedImageSampling(8.5, guidance_ramp=True, top_k=1200, top_p=0.8, refinements=[[100, 0.8], [1, 1.0]])
    assert [(s.top_k, s.top_p) for s in sampling.rounds] == [(1200, 0.8), (100, 0.8), (1, 1.0)]
    assert [sampling.guidance_at(k, 9) for k in (0, 4, 8)] == [1.0, 1 + 7.5 / 2, 1 + 7.5]


def test_a_image_of_the_models_size_is_read_as_codes_and_written_again(model):
    pixels = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    codes = model.get_image_tokens(pixels)
    assert torch.equal(codes, model.vq_model.encode(pixels).image_tokens)
    written = torch.stack(model.decode_image_tokens(codes))
    assert torch.equal(written, model.vq_model.decode(codes, model.config.schedule))


def test_the_7b_model_builds_on_the_meta_device():
    with torch.device("meta"):
        model = TokenFlowT2IForConditionalGeneration(TokenFlowT2IConfig())
    config, count = model.config, sum(n * n for n in (1, 2, 4, 6, 8, 10, 12, 14, 16))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["position_embedding"] == (count, 4096) and shapes["scale_embedding.weight"] == (10, 4096)
    assert shapes["lm_head.weight"] == shapes["language_model.embed_tokens.weight"] == (64769, 4096)
    assert shapes["connector.0.weight"] == (4096, 40)
    assert shapes["language_model.layers.31.self_attn.q_norm.weight"] == (128,)
    assert config.image_size == (256, 256) and config.text_config.rms_norm_eps == 1e-5
    assert model.language_model.layers[0].self_attn.k_norm.variance_epsilon == 1e-6


# --- the processor ---


def test_prompts_begin_with_the_first_token_are_padded_on_the_left_and_hold_no_special_tokens(processor):
    inputs = processor.apply_image_prompt(["a <|im_end|>", "two blue squares and a green star " * 3])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert mask[:, -1].all() and not mask[0, 0] and mask[1].all()
    begin = processor.tokenizer("").input_ids[0]
    assert ids[0][mask[0].bool()][0] == begin and ids[1, 0] == begin
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids[0]
    assert (ids[0][~mask[0].bool()] == processor.tokenizer.pad_token_id).all()


def test_a_tokenizer_without_a_first_or_a_padding_token_is_refused(processor):
    from tiny import tiny_tokenizer

    with pytest.raises(ValueError, match="reads an empty text as"):
        TokenFlowT2IProcessor(processor.image_processor, tiny_tokenizer())
    tokenizer = tiny_t2i_processor().tokenizer
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad_token"):
        TokenFlowT2IProcessor(processor.image_processor, tokenizer)


# --- the pipeline ---


def test_the_pipeline_draws_what_the_model_draws(pipe, model, processor):
    output = pipe(PROMPTS, generator=[seeded(0), seeded(1)])
    inputs, _ = guided_inputs(processor, negatives=("", ""))
    drawn = model.generate_images(**inputs, generator=[seeded(0), seeded(1)])
    assert torch.equal(output.image_tokens, drawn.image_tokens)
    assert [image.size for image in output.images] == [(16, 16)] * 2 and isinstance(output.images[0], Image.Image)


def test_the_pipeline_takes_settings_and_keeps_the_checkpoints_refinement(processor):
    sampling = {"guidance_scale": 3.0, "top_k": 20, "refinements": [[5, 0.8]]}
    pipe = quiet(NextFlowPipeline(model=tiny_t2i_model(image_sampling=sampling), processor=processor))
    output = pipe(PROMPTS[0], negative_prompt="one", top_p=0.9, generator=seeded())
    inputs, _ = guided_inputs(processor, PROMPTS[:1], ["one"])
    expected = RefinedImageSampling(**sampling | {"top_p": 0.9})
    drawn = pipe.model.generate_images(**inputs, sampling=expected, generator=seeded())
    assert torch.equal(output.image_tokens, drawn.image_tokens)


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: pipe(PROMPTS[0], num_candidates=2),
        lambda pipe: pipe.video(PROMPTS[0], num_frames=2),
        lambda pipe: pipe.score([Image.new("RGB", (16, 16))], PROMPTS[:1]),
        lambda pipe: pipe.chat([{"role": "user", "content": "a star"}]),
    ],
    ids=["candidates", "video", "score", "chat"],
)
def test_what_reads_images_is_refused(call, pipe):
    with pytest.raises(ValueError, match="takes a model that reads images; TokenFlowT2I.* only draws"):
        call(pipe)


@pytest.mark.parametrize("layout", ["pipeline", "plain folder"])
def test_a_saved_pipeline_draws_the_same_image(pipe, tmp_path, layout):
    if layout == "pipeline":
        pipe.save_pretrained(tmp_path)
    else:
        pipe.model.save_pretrained(tmp_path)
        pipe.processor.save_pretrained(tmp_path)
    loaded = quiet(NextFlowPipeline.from_pretrained(tmp_path))
    assert type(loaded.model) is TokenFlowT2IForConditionalGeneration
    drawn = [p(PROMPTS[0], generator=seeded(), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*drawn)


def test_auto_classes_load_it_and_bfloat16_keeps_the_codebooks(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TokenFlowT2IConfig
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is TokenFlowT2IProcessor and processor.max_text_tokens == 128
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(model) is TokenFlowT2IForConditionalGeneration
    assert model.vq_model.quantizer.pixel_codebook.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.vq_model.parameters())
    assert (
        model.generate_images(**processor.apply_image_prompt(PROMPTS), sampling=ImageSampling()).image_tokens.min() >= 0
    )


def test_diffusion_pipeline_loads_it_in_a_fresh_process(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    code = f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
torch.save(pipe({PROMPTS[0]!r}, generator=generator).image_tokens, {str(tmp_path / "codes.pt")!r})
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert torch.equal(torch.load(tmp_path / "codes.pt"), pipe(PROMPTS[0], generator=seeded()).image_tokens)


def test_settings_that_a_checkpoint_may_not_have_are_named(processor):
    model = tiny_t2i_model(image_sampling={"top_kk": 3})
    with pytest.raises(ValueError, match="has no 'top_kk'; did you mean top_k"):
        model.generate_images(**processor.apply_image_prompt(PROMPTS))


def test_a_image_has_the_size_that_its_tokenizer_reads():
    config = TokenFlowT2IConfig(vq_config=tokenflow_config("siglip_384"))
    assert config.image_size == (384, 384)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(model, tmp_path):
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "position_embedding"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="lacks .*position_embedding"):
        TokenFlowT2IForConditionalGeneration.from_pretrained(tmp_path)


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "Prompt 0 is empty"),
        ({"prompt": "a " * 200}, "The prompt 'a a a .*more than the 128"),
        ({"negative_prompt": "b " * 200}, "The prompt 'b b b .*more than the 128"),
        ({"height": 8, "width": 32}, "only images of 16x16 pixels, got 8x32"),
        ({"guidance_scale": -1.0}, "at least 0"),
        ({"generator": [seeded()] * 2}, "2 generators came with a batch of 1"),
    ],
)
def test_bad_arguments_of_the_pipeline_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPTS[0]} | arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(1, 3, 16, 16)}, "does not take pixel_values"),
        ({"image_sizes": [(16, 16)]}, "2 prompts came with 1 image_sizes"),
        ({"negative_input_ids": None}, "needs negative_input_ids"),
        ({"negative_input_ids": torch.ones(1, 3).long(), "negative_attention_mask": None}, "came with 1 negative"),
        ({"attention_mask": "flipped"}, "padded on the left"),
        ({"input_ids": torch.ones(0, 3).long(), "attention_mask": None}, "no prompt"),
        ({"given_image_tokens": torch.full((2, 5), 32)}, "go from 32 to 32; codes are below 32"),
        ({"given_image_tokens": torch.zeros(3, 5).long()}, "2 prompts came with 3 rows of given_image_tokens"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, processor, change, message):
    inputs, _ = guided_inputs(processor)
    if change.get("attention_mask") == "flipped":
        change = {"attention_mask": inputs["attention_mask"].flip(-1)}
    with pytest.raises(ValueError, match=message):
        model.generate_images(**inputs | change)


def test_codes_and_images_of_another_size_are_refused(model, processor):
    inputs = processor.apply_image_prompt(PROMPTS)
    with pytest.raises(ValueError, match="padded on the left"):
        model(inputs["input_ids"], inputs["attention_mask"].flip(-1))
    with pytest.raises(ValueError, match=r"must be \(2, 30\)"):
        model(**inputs, image_tokens=torch.zeros(2, 14).long())
    with pytest.raises(ValueError, match="Codes run from 0 to 31"):
        model(**inputs, image_tokens=torch.full((2, NUM_TOKENS), -1))
    with pytest.raises(ValueError, match="only images of"):
        model.get_image_tokens(torch.zeros(1, 3, 8, 32))
    with pytest.raises(ValueError, match="final grid"):
        model.decode_image_tokens(torch.zeros(1, NUM_TOKENS).long(), torch.tensor([[2, 8]]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_token_start": 0}, "lie outside"),
        ({"image_token_start": 380}, "lie outside"),
        ({"qk_norm_eps": 0.0}, "positive"),
    ],
)
def test_configurations_that_do_not_fit_together_are_refused(values, message):
    # The strict dataclass of huggingface_hub raises its own error from ours, or ours itself.
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_t2i_config(**values)


@pytest.mark.parametrize("refinements", [5, None, (5,), ((0, 0.8),), ((5, 0.0),), ((5, 0.8, 1),)])
def test_refinements_out_of_range_are_refused(refinements):
    with pytest.raises(ValueError):
        RefinedImageSampling(refinements=refinements)
