"""The mask follows the attention of the backbone, in whatever way that is set and whatever the model around it has."""

import pytest
import torch
from test_generation import draw, mixed_prompts, negative, prompts, schedules_of
from test_modeling import attention
from test_packing import arguments, numbered_rows
from tiny import tiny_config, tiny_model, tiny_processor
from tiny_tokenflow_t2i import tiny_t2i_config, tiny_t2i_model, tiny_t2i_processor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transformers_nextflow import ImageSampling, NextFlowForConditionalGeneration, TokenFlowT2IForConditionalGeneration
from transformers_nextflow.sequence.scale_sdpa import SCALE_SDPA
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer


INNER = {"text_config": "eager"}


def loaded(folder, implementation):
    tiny_model().save_pretrained(folder)
    return NextFlowForConditionalGeneration.from_pretrained(folder, attn_implementation=implementation)


def changed(*implementations):
    model = tiny_model()
    for implementation in implementations:
        model.set_attn_implementation(implementation)
    return model


def changed_inside(implementation):
    model = tiny_model()
    model.model.language_model.set_attn_implementation(implementation)
    return model


def from_config(implementation):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NextFlowForConditionalGeneration._from_config(tiny_config(), attn_implementation=implementation)
    return model.eval()


WAYS = {
    "loaded, inner": (lambda folder: loaded(folder, INNER), "sdpa", "eager"),
    "loaded, outer": (lambda folder: loaded(folder, {"": "eager"}), "eager", SCALE_SDPA),
    "from config": (lambda _: from_config(INNER), "sdpa", "eager"),
    "in the config": (lambda _: tiny_model(attn_implementation=INNER), "sdpa", "eager"),
    "set, inner": (lambda _: changed(INNER), "sdpa", "eager"),
    "set, back again": (lambda _: changed("eager", {"text_config": "sdpa"}), "eager", "sdpa"),
    "set on the backbone": (lambda _: changed_inside("eager"), "sdpa", "eager"),
    "set, flex": (lambda _: changed({"text_config": "flex_attention"}), "sdpa", "flex_attention"),
}


@pytest.mark.parametrize("way", WAYS)
def test_drawing_under_padding_is_the_same_wherever_the_implementation_is_set(way, tmp_path):
    build, outer, inner = WAYS[way]
    model, plain = build(tmp_path), tiny_model()
    assert (model.config._attn_implementation, model.model.language_model.config._attn_implementation) == (outer, inner)
    schedules = schedules_of(model.config, [(16, 16), (8, 32), (20, 12)])
    inputs = prompts(model.config, mixed_prompts(model.config)) | negative(prompts(model.config, [[], [30, 31], [32]]))
    sampling = ImageSampling(guidance_scale=2.0, num_unguided_scales=1)
    expected, logits = draw(plain, schedules, inputs, sampling=sampling)
    with attention(inner):
        drawn, own = draw(model, schedules, inputs, sampling=sampling)
    for row, other in zip(own, logits):
        for scale, reference in zip(row, other):
            torch.testing.assert_close(scale, reference, atol=2e-5, rtol=0)
    assert torch.equal(drawn.image_tokens, expected.image_tokens)


def test_tokenflow_t2i_masks_as_its_backbone_attends():
    processor = tiny_t2i_processor()
    inputs = processor.apply_image_prompt(["one", "a red circle and two stars"])
    plain = tiny_t2i_model()
    model = TokenFlowT2IForConditionalGeneration._from_config(tiny_t2i_config(), attn_implementation=INNER).eval()
    model.load_state_dict(plain.state_dict())
    greedy = type(plain.default_image_sampling)(temperature=0)
    assert torch.equal(
        model.generate_images(**inputs, sampling=greedy).image_tokens,
        plain.generate_images(**inputs, sampling=greedy).image_tokens,
    )


def test_packing_keeps_an_attention_that_was_asked_for_the_backbone_alone(tmp_path):
    args = arguments(tmp_path, packing="length", packing_budget=300)
    for setting, expected in ((INNER, "eager"), ({"": "eager"}, SCALE_SDPA)):
        model = tiny_model(attn_implementation=setting)
        NextFlowTrainer(model, args, train_dataset=numbered_rows(6), data_collator=NextFlowCollator(tiny_processor()))
        assert model.config.text_config._attn_implementation == expected


def test_an_attention_that_no_mask_belongs_to_is_refused():
    AttentionInterface.register("without_a_mask", sdpa_attention_forward)
    for setting in ("without_a_mask", {"text_config": "without_a_mask"}):
        with pytest.raises(ValueError, match="'without_a_mask' has no mask function"):
            tiny_model().set_attn_implementation(setting)
        with pytest.raises(ValueError, match="'without_a_mask' has no mask function"):
            tiny_model(attn_implementation=setting)


def test_sliding_windows_are_refused_since_scales_need_all_that_comes_before():
    with pytest.raises(ValueError, match="need full_attention in every layer"):
        tiny_config(text_config={"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0})
