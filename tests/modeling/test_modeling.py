"""The transformer: mask, positions and features against the slow reference, text against Qwen2.5-VL, checkpoints."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from reference_nextflow import ReferenceImage, as_batch, attention_mask, input_features, rope_positions, scale_rows
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from transformers_nextflow import ImageSampling, NextFlowConfig, NextFlowForConditionalGeneration
from transformers_nextflow.generation.scale_loop import ImageCodes


ATTENTIONS = ("sdpa", "eager", "flex_attention")
LEVELS = {"levels": [[8, 2], [16, 4]]}
LAYOUTS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"read_last_scale": True},
        {"accumulate_features": True},
        {"accumulate_features": True, "read_last_scale": True, "vq_config": LEVELS | {"upsample": "nearest"}},
    ],
    ids=["default", "read last", "accumulated", "all"],
)


def attention(implementation):
    """Where `flex_attention` is tested it runs uncompiled: the compiler for CPUs does not know all its shapes."""
    flex = implementation == "flex_attention"
    return torch.compiler.set_stance("force_eager") if flex else contextlib.nullcontext()


def random_image(config, base_grid=(16, 16), level=None, seed=0) -> ReferenceImage:
    schedule = config.vq_config.scale_schedules.build(base_grid, level)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.vq_config.codebook_size, (schedule.num_tokens,), generator=generator)
    return ReferenceImage(list(schedule.grids), codes.tolist())


def special_tokens(config) -> tuple[int, int, int, bool]:
    return config.boi_token_id, config.eoi_token_id, config.image_token_id, config.read_last_scale


def ragged_batch(config):
    """Text before, between and after images of several ratios; images side by side; text alone."""
    low = config.vq_config.scale_schedules.resolutions[0]
    rows = [
        [20, 21, random_image(config, seed=1), 22, random_image(config, (8, 32), seed=2), 23, 24],
        [random_image(config, (20, 12), low, seed=3), random_image(config, (32, 8), seed=4), 25],
        [26, 27, 28],
    ]
    return as_batch(rows, *special_tokens(config))


@LAYOUTS
def test_mask_equals_the_reference(options):
    model = tiny_model(**options)
    model.set_attn_implementation("eager")
    rows, inputs = ragged_batch(model.config)
    first_layer = model(**inputs, output_attentions=True).attentions[0]
    for row, weights in zip(rows, first_layer):
        valid = torch.tensor([position.kind != "pad" for position in row])
        assert torch.equal((weights > 0).all(0)[valid], attention_mask(row)[valid])


@LAYOUTS
def test_positions_and_input_features_equal_the_reference(options):
    model = tiny_model(**options)
    rows, inputs = ragged_batch(model.config)
    seen = {}
    model.model.visual_embedding.register_forward_pre_hook(lambda _, args: seen.update(features=args[0]))
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(positions=kwargs["position_ids"]), with_kwargs=True
    )
    model(**inputs)

    vq_config, codebook = model.config.vq_config, model.model.visual_embedding.codes.weight
    how = {"upsample": vq_config.upsample, "downsample": vq_config.downsample}
    features = []
    for b, row in enumerate(rows):
        valid = inputs["attention_mask"][b].bool()
        slots = torch.tensor([position.kind == "slot" for position in row])
        # The model keeps Qwen2.5-VL's order of sections: the running coordinate first.
        x, y, s = rope_positions(row, model.config.rope_range)
        torch.testing.assert_close(seen["positions"][:, b, valid], torch.stack([s, x, y])[:, valid])
        accumulate = model.config.accumulate_features
        features.append(input_features(row, codebook, accumulate=accumulate, **how)[slots])
    torch.testing.assert_close(seen["features"], torch.cat(features), atol=1e-5, rtol=0)


def test_scale_and_number_of_scales_reach_the_slots_alone():
    model = tiny_model(vq_config=LEVELS)
    seen = {}
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    text = model.model.language_model.embed_tokens.weight
    short = random_image(model.config, level=8)
    long = ReferenceImage(random_image(model.config).grids, short.codes + [0] * 25)
    embeds = {}
    for image in (short, long):
        _, inputs = as_batch([[20, image, 21]], *special_tokens(model.config))
        model(**inputs)
        embeds[len(image.grids)] = seen["embeds"][0]
        torch.testing.assert_close(seen["embeds"][0, [0, 1, -2, -1]], text[inputs["input_ids"][0, [0, 1, -2, -1]]])
    # Both images read the same codes at scale 2; only the number of scales differs, and it is the same for all slots.
    difference = embeds[4][2:6] - embeds[2][2:6]
    assert difference.abs().max() > 1e-3
    torch.testing.assert_close(difference, difference[:1].expand(4, -1))


def test_slots_that_read_a_last_scale_have_a_row_of_their_own_at_every_level():
    model = tiny_model(vq_config=LEVELS, read_last_scale=True)
    embedding, seen = model.model.visual_embedding, []
    rows, inputs = ragged_batch(model.config)
    assert {len(position.image.grids) for row in rows for position in row if position.image} == {2, 4}
    embedding.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    table = embedding.scale.weight.detach().clone()
    model(**inputs)
    embedding.scale.weight.data.zero_()
    model(**inputs)
    torch.testing.assert_close(seen[0] - seen[1], table[scale_rows(rows, most_scales=4)])
    # What is drawn reads the same.
    embedding.scale.weight.data.copy_(table)
    low = model.config.vq_config.scale_schedules.build(level=8)
    for schedules in ([low], [low, model.config.vq_config.scale_schedules.build((20, 12))]):
        drawing = ImageCodes(model, schedules, ImageSampling())
        drawing.image_tokens.zero_()
        embedding.scale.weight.data.copy_(table)
        slots = drawing.last_slots()[0]
        embedding.scale.weight.data.zero_()
        torch.testing.assert_close(slots - drawing.last_slots()[0], table[5].expand_as(slots))


@pytest.mark.parametrize("implementation", ATTENTIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_text_only_logits_equal_those_of_qwen2_5_vl(implementation, tied):
    model = tiny_model(tie_word_embeddings=tied)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    text_config = model.config.text_config.to_dict()
    qwen_config = Qwen2_5_VLConfig(text_config=text_config, vision_config=vision, tie_word_embeddings=tied)
    qwen = Qwen2_5_VLForConditionalGeneration(qwen_config).eval()
    qwen.model.language_model.load_state_dict(model.model.language_model.state_dict())
    qwen.lm_head.load_state_dict(model.lm_head.state_dict())
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied

    inputs = {"input_ids": torch.randint(6, 300, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][1, :4] = 0
    model.set_attn_implementation(implementation)
    with torch.no_grad(), attention(implementation):
        # Left padding is where Qwen2.5-VL starts to count too, if it is told so.
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0).expand(3, -1, -1)
        expected = qwen(**inputs, position_ids=positions).logits
        logits = model(**inputs).logits[..., : model.config.text_config.vocab_size]
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[valid], expected[valid], atol=1e-5, rtol=0)


def test_all_attention_implementations_agree():
    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    logits = {}
    for implementation in ATTENTIONS:
        model.set_attn_implementation(implementation)
        with torch.no_grad(), attention(implementation):
            logits[implementation] = model(**inputs).logits[inputs["attention_mask"].bool()]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits["flex_attention"], logits["sdpa"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ATTENTIONS)
def test_rows_of_a_batch_do_not_touch_each_other(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    rows, inputs = ragged_batch(model.config)
    with torch.no_grad(), attention(implementation):
        together = model(**inputs).logits
        first_image = 0
        for b, row in enumerate(rows):
            valid = inputs["attention_mask"][b].bool()
            count = sum(position.kind == "boi" for position in row)
            images = slice(first_image, first_image + count)
            first_image += count
            alone = {"input_ids": inputs["input_ids"][b : b + 1, valid]}
            if count:
                alone |= {name: inputs[name][images] for name in ("image_tokens", "image_grids")}
            torch.testing.assert_close(model(**alone).logits[0], together[b, valid], atol=1e-5, rtol=0)


def test_pixels_are_encoded_like_the_codes_that_they_give():
    model = tiny_model()
    square, wide = random_image(model.config), random_image(model.config, (12, 20))
    _, inputs = as_batch([[20, square, wide, 21]], *special_tokens(model.config))
    pixels = torch.zeros(2, 3, 16, 20)
    pixels[0, :, :, :16] = torch.rand(3, 16, 16) * 2 - 1
    pixels[1, :, :12] = torch.rand(3, 12, 20) * 2 - 1
    codes = model.get_image_tokens(pixels, inputs["image_grids"])
    for row, cut in zip(codes, (pixels[:1, :, :, :16], pixels[1:, :, :12])):
        assert torch.equal(row[row >= 0], model.vq_model.encode(cut).image_tokens[0])
    from_codes = model(**inputs | {"image_tokens": codes}).logits
    inputs.pop("image_tokens")
    torch.testing.assert_close(model(**inputs, pixel_values=pixels).logits, from_codes)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_model_gives_equal_logits(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied, read_last_scale=True)
    _, inputs = ragged_batch(model.config)
    model.save_pretrained(tmp_path)
    loaded, report = NextFlowForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    loaded.save_pretrained(tmp_path / "again")
    # Loading tells parts of the config their dtype; one that has none is written as null or, by 5.17, not at all.
    written = [(folder / "config.json").read_text().splitlines() for folder in (tmp_path, tmp_path / "again")]
    first, again = ([line for line in lines if '"dtype":' not in line] for lines in written)
    assert again == first
    assert {line.strip() for line in written[1] if '"dtype":' in line} == {'"dtype": "float32",'}
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert not any(parameter.requires_grad for parameter in loaded.vq_model.parameters())


def test_model_loads_with_a_device_map(tmp_path):
    pytest.importorskip("accelerate")
    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["visual_head.weight", "model.language_model.layers.1.mlp.up_proj.weight"])
def test_checkpoint_with_a_missing_tensor_is_refused(tmp_path, name):
    tiny_model().save_pretrained(tmp_path)
    rewrite_tensor(tmp_path, name, None)
    with pytest.raises(ValueError, match=name):
        NextFlowForConditionalGeneration.from_pretrained(tmp_path)


def test_checkpoint_with_a_misshapen_tensor_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    rewrite_tensor(tmp_path, "visual_head.weight", torch.zeros(31, 32))
    with pytest.raises((ValueError, RuntimeError)):
        NextFlowForConditionalGeneration.from_pretrained(tmp_path)


def rewrite_tensor(folder, name, tensor):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_bfloat16_runs_and_keeps_the_quantiser_in_float32(tmp_path):
    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits = loaded(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.vq_model.quantizer.parameters()} == {torch.float32}
    valid = inputs["attention_mask"].bool()
    assert F.cosine_similarity(logits[valid].float(), expected[valid], dim=-1).min() > 0.99
    assert loaded.get_image_tokens(torch.rand(1, 3, 16, 16), torch.tensor([[4, 4]])).shape == (1, 30)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        _, inputs = ragged_batch(model.config)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_text_embeddings_can_be_resized(tied):
    model = tiny_model(tie_word_embeddings=tied)
    _, inputs = ragged_batch(model.config)
    before = model(**inputs).logits
    vocab_size, codes = model.config.text_config.vocab_size, model.config.vq_config.codebook_size
    model.resize_token_embeddings(vocab_size + 8)
    assert model.config.text_config.vocab_size == vocab_size + 8
    assert model.config.vocab_size == vocab_size + 8 + codes
    after = model(**inputs).logits
    torch.testing.assert_close(after[..., :vocab_size], before[..., :vocab_size])
    torch.testing.assert_close(after[..., vocab_size + 8 :], before[..., vocab_size:])
    assert torch.isfinite(model(**inputs, labels=inputs["input_ids"]).loss)


def test_parallel_plans_name_modules_that_exist():
    model = tiny_model()
    modules = dict(model.named_modules())
    # transformers adds names to every FSDP plan that a model may have or not; these are the ones that count.
    fsdp_plan = [name for name in model._fsdp_plan if name.endswith("head") or "language_model" in name]
    # In transformers 5.17 only tied embeddings are divided by tensor parallelism.
    assert "model.language_model.embed_tokens" in fsdp_plan
    for plan in (model.tp_plan, fsdp_plan):
        assert {"lm_head", "visual_head"} <= set(plan)
        for pattern in plan:
            # Patterns write a layer's number as a star.
            assert pattern.replace("*", "0") in modules, pattern


@pytest.mark.parametrize(
    "values, message",
    [
        ({"vq_config": {"codebook_size": 0}}, "codebook_size must be at least 1, got 0"),
        ({"boi_token_id": 320}, "boi_token_id 320 lies outside the text vocabulary of 320"),
        ({"eoi_token_id": -1}, "eoi_token_id -1 lies outside"),
        ({"image_token_id": 3}, "must differ"),
        ({"rope_range": 0.0}, "rope_range must be positive"),
        (
            {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1]}}},
            r"mrope_section \[2, 1\] has 3 frequencies, but heads of 8 channels have 4",
        ),
        ({"vq_config": {"scales": (2, 3, 4)}}, "start at 1"),
        ({"vq_config": {"levels": [[12, 2]]}}, "Level 12 with 2 scales does not fit"),
        ({"vq_config": {"upsample": "sinc"}}, "upsample must be one of"),
        ({"vq_config": {"pixel_encoder_type": "convolutional"}}, "downsample an image by 16, but patch_size is 4"),
        ({"vq_config": {"pixel_encoder_type": "magic"}}, "pixel_encoder_type must be"),
        ({"vq_config": {"semantic_layer": 1}}, "semantic_layer counts from the last of 1 layers, -1, .* got 1"),
        ({"vq_config": {"semantic_decoder_positions": "random"}}, "semantic_decoder_positions must be one of"),
        ({"vq_config": {"image_size": 0}}, "image_size must be at least 1 pixel, got 0"),
        ({"vq_config": {"semantic_decoder_heads": 3}}, "not a multiple of semantic_decoder_heads 3"),
    ],
)
def test_inconsistent_config_is_refused(values, message):
    with pytest.raises(Exception, match=message) as error:
        tiny_config(**values)
    # The strict dataclass of huggingface_hub raises its own error from ours, or ours itself.
    assert isinstance(error.value, ValueError) or isinstance(error.value.__cause__, ValueError)


def test_codebook_that_differs_from_the_config_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = tiny_config(vq_config={"codebook_size": 64})
    with pytest.raises((ValueError, RuntimeError)):
        NextFlowForConditionalGeneration.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_tokens": None, "image_grids": None}, "0 images were given"),
        ({"image_grids": torch.tensor([[3, 5]])}, "slots behind their <boi>"),
        ({"image_grids": torch.tensor([[4, 4], [4, 4]])}, "2 images were given"),
        ({"image_grids": torch.tensor([[5, 9]])}, "nearest"),
        ({"image_tokens": torch.full((1, 30), 32)}, "image_tokens run from 0 to 31, got 32"),
        ({"image_tokens": torch.full((2, 30), 1)}, "2 rows of image_tokens came with 1 image_grids"),
        ({"image_tokens": torch.full((1, 5), 1)}, "codes"),
        ({"image_tokens": None}, "image_tokens|pixel_values"),
    ],
)
def test_placeholders_that_do_not_match_the_images_are_refused(change, message):
    model = tiny_model()
    _, inputs = as_batch([[20, random_image(model.config), 21]], *special_tokens(model.config))
    with pytest.raises(ValueError, match=message):
        model(**inputs | change)


def test_pixels_without_grids_are_refused():
    with pytest.raises(ValueError, match="pixel_values need image_grids"):
        tiny_model()(torch.tensor([[20]]), pixel_values=torch.zeros(1, 3, 16, 16))


def test_loading_a_tokenizer_starts_the_visual_embeddings_from_its_codebooks():
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    model.load_vision_tokenizer(other.vq_model)
    torch.testing.assert_close(model.model.visual_embedding.codes.weight, other.vq_model.quantizer.codebook)
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(model.vq_model.encode(pixels).image_tokens, other.vq_model.encode(pixels).image_tokens)


@pytest.mark.parametrize(
    "preset, parameters",
    # Qwen2.5's own counts, whose vocabulary has 151,936 tokens and whose head is tied; no norm of heads, no vision.
    [("nextflow_0_5b", 494_032_768), ("nextflow_1_5b", 1_543_714_304), ("nextflow_3b", 3_085_938_688)],
)
def test_smaller_presets_have_the_backbones_of_qwen(preset, parameters):
    config = getattr(NextFlowConfig, preset)()
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(config)
    backbone = sum(p.numel() for p in model.model.language_model.parameters())
    assert backbone == parameters + (152066 - 151936) * config.text_config.hidden_size
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert config.vq_config.scale_schedules.build(level=1024).num_tokens == 10084


def test_preset_of_the_paper_builds_on_the_meta_device():
    config = NextFlowConfig.nextflow_7b()
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(config)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    # Qwen2.5-VL-7B's language model holds 7,070,619,136 parameters with 152,064 tokens and no head.
    assert count["language_model"] == 7_070_619_136 + 2 * 3584
    heads = model.lm_head.weight.numel() + model.visual_head.weight.numel()
    assert heads == (152066 + 32768) * 3584
    assert model.num_parameters() == sum(count.values()) + heads
    assert config.vq_config.scale_schedules.build(level=1024).num_tokens == 10084
    assert math.isclose(sum(count.values()) + heads, 8.3e9, rel_tol=0.05)
