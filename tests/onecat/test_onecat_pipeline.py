"""OneCAT in the pipeline: drawings, edits, chats, saving, offloading, adapters, errors."""

import accelerate
import numpy as np
import pytest
import torch
from library_versions import matching_peft
from PIL import Image
from test_onecat import ANSWER, PROMPTS, QUESTION, RED, WIDE, inputs_of, quiet, seeded
from tiny_onecat import tiny_onecat_model
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from transformers_nextflow import (
    BitwiseEditingSampling,
    BitwiseImageSampling,
    NextFlowPipeline,
    OneCatConfig,
    OneCatForConditionalGeneration,
    OneCatProcessor,
)
from transformers_nextflow.adapters import lora_config, quantization_config
from transformers_nextflow.generation.interleaved import InterleavedStreamer


@pytest.mark.parametrize("image", [None, [RED, WIDE]], ids=["draw", "edit"])
def test_the_pipeline_draws_what_the_model_draws(pipe, model, processor, image):
    output = pipe(PROMPTS, image=image, generator=[seeded(0), seeded(1)], height=64, width=64)
    images = None if image is None else [[one] for one in image]
    inputs = inputs_of(processor, images=images, sizes=[(64, 64)] * 2)
    drawn = model.generate_images(**inputs, generator=[seeded(0), seeded(1)])
    assert torch.equal(output.image_tokens, drawn.image_tokens)
    assert [image.size for image in output.images] == [(64, 64)] * 2


def test_an_edit_has_the_size_of_the_nearest_ratio_and_settings_of_its_own(pipe):
    sizes = [image.size for image in pipe(PROMPTS, image=[RED, Image.new("RGB", (64, 43))], generator=seeded()).images]
    assert sizes == [(32, 32), (64, 48)] or sizes == [(32, 32), (48, 32)]
    assert pipe._sampling(True) == BitwiseEditingSampling(3.0, 1.5, temperature=0.5, top_p=0.97)
    assert pipe._sampling(False) == BitwiseImageSampling(20.0, temperature=0.5, top_p=0.97)


def test_several_images_previews_interruption_and_variations(pipe):
    seen = []

    def watch(pipe, step, scale, kwargs):
        seen.append(kwargs["preview"].shape)
        pipe._interrupt = step == 1

    options = {"callback_on_step_end_tensor_inputs": ["preview"], "output_type": "pt", "generator": seeded()}
    output = pipe(PROMPTS[0], num_images_per_prompt=2, callback_on_step_end=watch, **options)
    assert seen == [(2, 3, 64, 64)] * 2 and output.image_tokens.shape == (2, 5)
    source = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    varied = pipe(PROMPTS[0], image=source, num_kept_scales=2, num_images_per_prompt=2, generator=seeded()).image_tokens
    assert torch.equal(varied[0, :5], varied[1, :5]) and not torch.equal(varied[0], varied[1])


def test_a_chat_is_answered_and_a_batch_of_ragged_ones_as_each_alone(pipe):
    chats = [QUESTION, [{"role": "user", "content": "hello there, whoever you are"}]]
    batch = pipe.chat(chats, max_new_tokens=4, do_sample=False)
    assert [message["role"] for message in batch] == ["assistant"] * 2
    assert [pipe.chat(chat, max_new_tokens=4, do_sample=False) for chat in chats] == batch


def test_an_answer_is_streamed_without_its_prompt_and_says_why_it_ended(pipe):
    options = {"max_new_tokens": 6, "do_sample": False, "return_finish_reasons": True}
    streamer = InterleavedStreamer(pipe.processor.tokenizer, timeout=30, skip_special_tokens=True)
    answer, reason = pipe.chat(QUESTION, streamer=streamer, **options)
    text = answer["content"][0]["text"]
    assert "".join(streamer).strip() == text and reason == "length"
    _, reason = pipe.chat(QUESTION, stop_strings=text[0], **options)
    assert reason == "stop"
    every = list(range(pipe.model.config.text_config.vocab_size))
    assert pipe.chat([QUESTION], eos_token_id=every, **options)[1] == ["stop"]


def answers(pipe):
    return pipe.model.generate(
        **pipe.processor.apply_chat_template(
            [QUESTION], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ),
        **ANSWER,
    )


@pytest.mark.parametrize("offload", ["sequential", "model"])
def test_an_offloaded_model_draws_edits_and_answers_the_same(pipe, processor, offload):
    other = quiet(NextFlowPipeline(tiny_onecat_model(), processor))
    if offload == "sequential":
        accelerate.cpu_offload(other.model, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload_with_hook(other.model, execution_device=torch.device("cpu"))
    for image in (None, RED):
        drawn = [p(PROMPTS[0], image=image, generator=seeded(), output_type="pt") for p in (pipe, other)]
        assert torch.equal(drawn[0].image_tokens, drawn[1].image_tokens)
        assert torch.equal(drawn[0].images, drawn[1].images)
    assert torch.equal(answers(pipe), answers(other))


@pytest.mark.parametrize("layout", ["pipeline", "plain folder"])
def test_a_saved_model_does_the_same(pipe, tmp_path, layout):
    if layout == "pipeline":
        pipe.save_pretrained(tmp_path)
    else:
        pipe.model.save_pretrained(tmp_path)
        pipe.processor.save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is OneCatConfig
        assert type(AutoProcessor.from_pretrained(tmp_path)) is OneCatProcessor
        assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is OneCatForConditionalGeneration
    loaded = quiet(NextFlowPipeline.from_pretrained(tmp_path))
    drawn = [p(PROMPTS[0], generator=seeded(), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*drawn)
    assert torch.equal(answers(pipe), answers(loaded))


def test_a_model_that_only_draws_is_smaller_and_draws_the_same(pipe, tmp_path, recwarn):
    pipe.model.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    drawing = quiet(NextFlowPipeline.from_pretrained(tmp_path, drawing_only=True))
    names = {name for name, _ in drawing.model.named_parameters()}
    left_out = {name for name, _ in pipe.model.named_parameters()} - names
    assert {name.split(".")[0] for name in left_out} == {"language_model", "reader", "lm_head"}
    assert all("mlp_ue" in name for name in left_out if name.startswith("language_model"))
    drawn = [p(PROMPTS[0], generator=seeded()).image_tokens for p in (pipe, drawing)]
    assert torch.equal(*drawn)
    for call in (lambda: drawing(PROMPTS[0], image=RED), lambda: drawing.chat(QUESTION)):
        with pytest.raises(ValueError, match="loaded with drawing_only=True"):
            call()


def test_experts_that_only_read_prompts_wait_elsewhere(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path / "model")
    places = OneCatForConditionalGeneration.drawing_device_map(pipe.model.config, "cpu", "disk")
    model = OneCatForConditionalGeneration.from_pretrained(
        tmp_path / "model", drawing_only=True, device_map=places, offload_folder=tmp_path / "away"
    )
    waiting = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert waiting and all("mlp_te" in name or "embed_tokens" in name for name in waiting)
    drawing = quiet(NextFlowPipeline(model, pipe.processor))
    drawn = [p(PROMPTS[0], generator=seeded(), output_type="pt") for p in (pipe, drawing)]
    assert torch.equal(drawn[0].image_tokens, drawn[1].image_tokens)
    assert torch.equal(drawn[0].images, drawn[1].images)


@matching_peft
def test_a_lora_of_peft_is_saved_and_loaded_with_the_pipeline(pipe, processor, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_onecat_model(), lora_config(pipe.model, rank=2))
    assert {"mlp_ge", "mlp_te", "mlp_ue", "self_attn"} == {
        n.split(".")[-5] for n, _ in model.named_parameters() if n.endswith("lora_B.default.weight")
    }
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, generator=seeded())
    adapted = quiet(NextFlowPipeline(model=model, processor=processor))
    drawn = adapted(PROMPTS[0], generator=seeded()).image_tokens
    assert not torch.equal(drawn, pipe(PROMPTS[0], generator=seeded()).image_tokens)
    adapted.save_pretrained(tmp_path / "pipeline")
    loaded = quiet(NextFlowPipeline.from_pretrained(tmp_path / "pipeline"))
    assert torch.equal(loaded(PROMPTS[0], generator=seeded()).image_tokens, drawn)
    merged = quiet(NextFlowPipeline(model=model.merge_and_unload(), processor=processor))
    assert torch.equal(
        merged(PROMPTS[0], generator=seeded(), temperature=0).image_tokens,
        loaded(PROMPTS[0], generator=seeded(), temperature=0).image_tokens,
    )


def test_quantisation_is_refused(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="OneCAT is not quantised"):
        OneCatForConditionalGeneration.from_pretrained(tmp_path, quantization_config=quantization_config())


def test_bfloat16_keeps_the_encoder_and_draws(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    model = OneCatForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.vq_model.encoder.conv_in.weight.dtype == torch.float32
    assert model.vq_model.decoder.conv_in.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.vq_model.parameters())
    assert model.generate_images(**inputs_of(pipe.processor)).image_tokens[0].min() >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "Prompt 0 is empty"),
        ({"height": 100, "width": 64}, "is none of the .* sizes drawn"),
        ({"image": [RED, WIDE]}, "edits one image for each prompt"),
        ({"image": RED, "mask_image": Image.new("L", (32, 32), 255)}, "does not draw inside of masks"),
        ({"think": True}, "not trained to think"),
        ({"num_candidates": 2}, "takes a model that reads what it draws"),
        ({"image_guidance_scale": 2.0}, "give image="),
        ({"generator": [seeded()] * 2}, "2 generators came with a batch of 1"),
    ],
)
def test_bad_arguments_of_the_pipeline_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPTS[0]} | arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.video("one", num_frames=2), "takes a model that reads what it draws"),
        (lambda pipe: pipe.score([RED], ["one"]), "takes a model that reads what it draws"),
        (lambda pipe: pipe.chat(QUESTION, min_images=1), "does not take min_images in a chat"),
        (lambda pipe: pipe.chat(QUESTION, height=64, generator=seeded()), "does not take height, generator"),
        (lambda pipe: pipe.chat(QUESTION, num_return_sequences=2, do_sample=True), "one answer"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe)
