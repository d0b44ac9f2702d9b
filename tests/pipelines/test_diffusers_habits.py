"""What a user of diffusers types without looking it up."""

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    PipelineQuantizationConfig,
)
from test_pipeline import NUM_SCALES, PROMPTS, draw, quiet, seeded
from tiny import tiny_model, tiny_processor
from transformers import BitsAndBytesConfig

from transformers_nextflow import NextFlowPipeline


@pytest.fixture(scope="module")
def pipe():
    return quiet(NextFlowPipeline(tiny_model(), tiny_processor()))


def test_the_output_type_latent_gives_codes_that_decode_to_the_image(pipe):
    codes = draw(pipe, output_type="latent")
    grids = torch.tensor([[4, 4]])
    decoded = pipe.processor.post_process_images(pipe.model.decode_image_tokens(codes, grids), "pt")
    assert torch.equal(torch.stack(decoded), draw(pipe))
    assert torch.equal(draw(pipe, output_type="latent", return_dict=True), codes)


def test_a_callback_that_returns_what_it_was_given_changes_nothing(pipe):
    assert torch.equal(draw(pipe, callback_on_step_end=lambda pipe, step, scale, kwargs: kwargs), draw(pipe))


def test_the_next_scale_reads_the_codes_that_a_callback_returns(pipe):
    other = pipe(PROMPTS[1], guidance_scale=2.0, generator=seeded(5)).image_tokens
    ends = [1, 5, 14, 30]

    def swap(pipe, step, scale, kwargs):
        if scale < 2:
            kwargs["image_tokens"] = other[:, : ends[scale]]
        return kwargs

    changed = pipe(PROMPTS[0], guidance_scale=2.0, generator=seeded(0), callback_on_step_end=swap).image_tokens
    assert torch.equal(changed[:, :5], other[:, :5]) and not torch.equal(changed, other)
    # The same as if these codes had been given from the start, whose scales take no random numbers.
    inputs = pipe.processor.apply_image_prompt([PROMPTS[0]])
    empty = pipe.processor.apply_image_prompt([""], allow_empty=True)
    generator = seeded(0)
    torch.rand(5, generator=generator)
    expected = pipe.model.generate_images(
        **inputs, negative_input_ids=empty.input_ids, negative_attention_mask=empty.attention_mask,
        image_sizes=[(16, 16)], given_image_tokens=other[:, :5], generator=generator,
        sampling=pipe._sampling(False, guidance_scale=2.0),
    ).image_tokens  # fmt: skip
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (7, "must return None or its callback_kwargs, got 7"),
        ({"image_tokens": torch.zeros(2, 9, dtype=torch.long)}, r"whole numbers \(1, 1\)"),
        ({"image_tokens": torch.zeros(1, 1)}, "whole numbers"),
        ({"image_tokens": torch.tensor([[32]])}, "lie from 0 to 31"),
    ],
    ids=["a number", "another shape", "floats", "no code"],
)
def test_what_a_callback_may_not_return_is_refused(pipe, returned, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, callback_on_step_end=lambda *_: returned)


def test_decoding_in_parts_needs_no_switch(pipe):
    expected = draw(pipe)
    for ways in ("enable", "disable"):
        getattr(pipe, f"{ways}_vae_slicing")()
        getattr(pipe, f"{ways}_vae_tiling")()
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize(
    ("name", "instead"),
    [("prompt_embeds", "prompt, which is read"), ("cross_attention_kwargs", "the weights that set_adapters takes")],
)
def test_arguments_of_diffusers_own_pipelines_are_told_what_stands_for_them(pipe, name, instead):
    with pytest.raises(ValueError, match=f"has no '{name}'; did you mean {instead}"):
        pipe("one", **{name: None})


@pytest.mark.parametrize("auto", [AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_auto_pipelines_take_it_over_from_another(pipe, auto):
    other = auto.from_pipe(pipe)
    assert type(other) is NextFlowPipeline and other.model is pipe.model
    assert torch.equal(draw(quiet(other)), draw(pipe))


def test_a_quantisation_by_component_reaches_the_model(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    own = BitsAndBytesConfig(load_in_8bit=True)
    taken = []
    from transformers_nextflow import pipeline_nextflow

    class Recorder:
        @staticmethod
        def from_pretrained(path, **kwargs):
            taken.append(kwargs.get("quantization_config"))
            return pipe.model

    monkeypatch.setattr(pipeline_nextflow, "AutoModelForMultimodalLM", Recorder)
    for mapping in ({"model": own}, {"other": own}):
        NextFlowPipeline.from_pretrained(
            tmp_path, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
        )
    assert taken == [own, None]


@pytest.mark.parametrize("script", [["a red circle", "it moves", "it stops"], None], ids=["texts", "the model's"])
def test_a_video_shows_how_far_it_is(pipe, monkeypatch, script):
    totals, updates = [], []

    class Bar:
        def __init__(self, total):
            totals.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            updates.append(1)

    monkeypatch.setattr(pipe, "progress_bar", lambda total: Bar(total), raising=False)
    if script is None:
        pipe.video("a red circle", num_frames=3, max_transition_tokens=2, generator=seeded())
    else:
        pipe.video([script], generator=seeded())
    assert totals == [3 * NUM_SCALES] and len(updates) == 3 * NUM_SCALES
