"""The protocol by which transformers' `pipeline("any-to-any")` asks a model for text or an image."""

import pytest
import torch
from test_pipeline import seeded
from tiny import tiny_model, tiny_processor
from transformers.pipelines.any_to_any import AnyToAnyPipeline

from transformers_nextflow import NextFlowPipeline


@pytest.fixture(scope="module")
def parts():
    return tiny_model(), tiny_processor()


def chat(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def test_an_image_is_drawn_behind_a_chat_as_the_pipeline_draws_it(parts):
    model, processor = parts
    texts = ["a red circle", "two blue squares and a green star"]
    inputs = processor.apply_chat_template(
        [chat(text) for text in texts], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt", processor_kwargs={"padding": True},
    )  # fmt: skip
    empty = processor.apply_image_prompt(["", ""], allow_empty=True)
    sampling = NextFlowPipeline(*parts)._sampling(False, guidance_scale=2.0)
    codes = model.generate(
        **inputs, generation_mode="image", negative_input_ids=empty.input_ids,
        negative_attention_mask=empty.attention_mask, generator=seeded(), sampling=sampling,
    )  # fmt: skip
    images = processor.post_process_multimodal_output(model.decode_image_tokens(codes), generation_mode="image")
    pipe = NextFlowPipeline(*parts)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(texts, guidance_scale=2.0, generator=seeded())
    assert torch.equal(codes, expected.image_tokens) and images == expected.images


def test_without_negative_prompts_nothing_guides(parts):
    model, processor = parts
    inputs = processor.apply_image_prompt(["a red circle"])
    codes = model.generate(**inputs, generation_mode="image", generator=seeded())
    pipe = NextFlowPipeline(*parts)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(codes, pipe("a red circle", guidance_scale=1.0, generator=seeded()).image_tokens)


def test_codes_that_fit_no_square_and_other_modes_are_refused(parts):
    model, processor = parts
    with pytest.raises(ValueError, match="No square image has 7 codes"):
        model.decode_image_tokens(torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="got 'audio'"):
        model.generate(**processor.apply_image_prompt(["a"]), generation_mode="audio")


def test_the_pipeline_of_transformers_answers_with_text_and_with_an_image(parts, monkeypatch):
    model, processor = parts
    # Whether torchvision is there is all that it looks at.
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    pipe = AnyToAnyPipeline(model=model, processor=processor)
    answer = pipe(chat("a red circle"), max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)
    drawn = pipe(chat("a red circle"), generation_mode="image", generate_kwargs={"generator": seeded()})
    assert drawn[0]["generated_image"].size == (16, 16)
