"""The vision tokenizer: the quantiser against the slow reference, sizes, encoders, self-correction, previews."""

import pytest
import torch
from reference_nextflow import quantize
from tiny import tiny_model, tiny_vq_config

from transformers_nextflow import NextFlowVQModel, SelfCorrection
from transformers_nextflow.configuration_nextflow import CHOICES
from transformers_nextflow.data import load_vision_tokenizer, tokenizer_fingerprint
from transformers_nextflow.modeling_nextflow_vq import codebook_statistics
from transformers_nextflow.vision_tokenizer.pixel_branches import PIXEL_BRANCHES, ConvolutionalDecoder, PatchEncoder
from transformers_nextflow.vision_tokenizer.resampling import resample


CONVOLUTIONAL = {"pixel_encoder_type": "convolutional", "pixel_channels": 32, "pixel_channel_multipliers": (1, 1, 1)}
CONVOLUTIONAL |= {"pixel_decoder_channels": 32}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SEMANTIC_ENCODERS = {
    "siglip2 naflex": VISION | {"model_type": "siglip2_vision_model", "patch_size": 4, "num_patches": 16},
    "siglip": VISION | {"model_type": "siglip_vision_model", "patch_size": 4, "image_size": 16},
    "siglip, coarser patches": VISION | {"model_type": "siglip_vision_model", "patch_size": 8, "image_size": 32},
    "clip": VISION | {"model_type": "clip_vision_model", "patch_size": 4, "image_size": 16},
}


def tiny_vq_model(**kwargs) -> NextFlowVQModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NextFlowVQModel(tiny_vq_config(**kwargs)).eval()


@pytest.mark.parametrize("drawn", [False, True], ids=["nearest", "self-corrected"])
@pytest.mark.parametrize(
    "options",
    [
        {"normalize_codes": False},
        {"normalize_codes": True},
        {"normalize_codes": True, "semantic_distance_weight": 0.3, "downsample": "bilinear", "upsample": "nearest"},
        {"normalize_codes": False, "pixel_distance_weight": 3.0, "downsample": "bicubic", "upsample": "bilinear"},
    ],
    ids=["Euclidean", "unit length", "weighted semantics", "weighted pixels"],
)
def test_quantiser_equals_the_reference(options, drawn):
    model = tiny_vq_model(**options)
    schedule = model.config.scale_schedules.build((12, 20))
    latents = torch.randn(2, 8, *schedule.final_grid, generator=torch.Generator().manual_seed(1))
    correction = SelfCorrection(top_k=5) if drawn else None
    output = model.quantizer.encode(latents, schedule, correction, generator=torch.Generator().manual_seed(2))
    assert torch.equal(output.image_tokens, output.image_labels) != drawn
    how = {name: getattr(model.config, name) for name in ("downsample", "upsample")}
    weights = (model.config.semantic_distance_weight, model.config.pixel_distance_weight)
    for n in range(2):
        labels, total = quantize(
            latents[n],
            list(schedule.grids),
            model.quantizer.semantic_codebook.weight.detach(),
            model.quantizer.pixel_codebook.weight.detach(),
            weights,
            model.config.normalize_codes,
            drawn=output.image_tokens[n].tolist() if drawn else None,
            **how,
        )
        assert labels == output.image_labels[n].tolist()
        torch.testing.assert_close(output.features[n], total, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.quantizer.decode(output.image_tokens, schedule), output.features)


def latents_of(model, grid=(4, 4), seed=1):
    """Latents of two images that ask for gradients, and their schedule."""
    schedule = next(s for s in map(model.config.scale_schedules.build, [(16, 16), (12, 20)]) if s.final_grid == grid)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, *grid, generator=generator).requires_grad_(), schedule


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_of_the_first_scales_are_those_of_the_same_sum_without_codes(normalize):
    model = tiny_vq_model(normalize_codes=normalize)
    weights = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(2))
    for count in ([4, 4], [1, 3]):
        latents, schedule = latents_of(model, (3, 5))
        counts = torch.tensor(count)
        coded = model.quantizer.encode(latents, schedule, num_scales=counts).features
        plain = model.quantizer.truncate(latents, schedule, counts)
        gradients = [torch.autograd.grad((weights * total).sum(), latents)[0] for total in (coded, plain)]
        assert not torch.allclose(coded, plain, atol=0.1)
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_how_many_scales_are_kept_changes_no_code_and_no_loss():
    model = tiny_vq_model()
    latents, schedule = latents_of(model)
    whole = model.quantizer.encode(latents, schedule)
    kept = model.quantizer.encode(latents, schedule, num_scales=torch.tensor([1, 3]))
    for name in ("image_tokens", "image_labels", "codebook_loss", "commitment_loss"):
        assert torch.equal(getattr(kept, name), getattr(whole, name)), name
    assert not torch.equal(kept.features, whole.features)


def test_each_loss_moves_its_own_side_and_is_a_mean_over_the_scales():
    model = tiny_vq_model(normalize_codes=False)
    latents, schedule = latents_of(model)
    output = model.quantizer.encode(latents, schedule)
    residual, codebook, differences = latents, model.quantizer.codebook, []
    for grid, codes in zip(schedule.grids, schedule.split(output.image_tokens)):
        vectors = codebook[codes].permute(0, 3, 1, 2)
        differences.append((vectors - resample(residual, grid, "area")).square().mean())
        residual = residual - resample(vectors, schedule.final_grid, "bicubic")
    expected = sum(differences) / len(differences)
    codebooks = [model.quantizer.semantic_codebook.weight, model.quantizer.pixel_codebook.weight]
    for loss, moves_codes in ((output.codebook_loss, True), (output.commitment_loss, False)):
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, [latents, *codebooks], retain_graph=True, allow_unused=True)
        moved = [gradient is not None and bool(gradient.any()) for gradient in gradients]
        assert moved == ([False, True, True] if moves_codes else [True, False, False])


@torch.no_grad()
def test_self_correction_leaves_the_codes_of_the_image_itself_beside_it():
    model, pixels = tiny_model().vq_model, torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clean = model.encode(pixels)
    assert torch.equal(clean.image_tokens, clean.image_labels) and torch.equal(
        clean.image_tokens, clean.image_clean_tokens
    )
    sampled = model.encode(pixels, SelfCorrection(top_k=5), torch.Generator().manual_seed(1))
    assert torch.equal(sampled.image_clean_tokens, clean.image_tokens)
    # The labels go on from what was sampled, so they are no codes of the image beyond the first scale.
    assert torch.equal(sampled.image_labels[:, 0], clean.image_tokens[:, 0])
    assert (sampled.image_labels != clean.image_tokens).any(dim=1).all()


def test_self_correction_draws_the_asked_share_among_the_nearest_codes():
    model = tiny_vq_model()
    schedule = model.config.scale_schedules.build()
    latents = torch.randn(400, 8, 4, 4, generator=torch.Generator().manual_seed(0))

    def share_replaced(**kwargs):
        generator = torch.Generator().manual_seed(1)
        output = model.quantizer.encode(latents, schedule, SelfCorrection(**kwargs), generator=generator)
        return (output.image_tokens != output.image_labels).float()

    # So hot a draw is uniform: of ten candidates one is the nearest itself.
    replaced = share_replaced(top_k=10, token_share=0.6, temperature=1e6)
    for part in schedule.split(replaced):
        assert part.mean() == pytest.approx(0.6 * 0.9, abs=0.06)
    assert share_replaced(top_k=1).sum() == 0
    assert share_replaced(token_share=0.0).sum() == 0
    assert share_replaced(token_share=1.0, top_k=32, temperature=1e-6).mean() < 0.01
    for wrong in ({"top_k": 0}, {"token_share": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="SelfCorrection takes"):
            SelfCorrection(**wrong)


@pytest.mark.parametrize("pixel_branch", [{}, CONVOLUTIONAL], ids=["patch", "convolutional"])
@pytest.mark.parametrize("base_grid", [(16, 16), (8, 32), (32, 8), (20, 12)])
@pytest.mark.parametrize("level", [8, 16])
def test_images_of_every_ratio_and_level_are_encoded_and_decoded(pixel_branch, base_grid, level):
    model = tiny_vq_model(levels=[[8, 2], [16, 4]], **pixel_branch)
    schedule = model.config.scale_schedules.build(base_grid, level)
    height, width = schedule.image_size(4)
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = model.encode(pixels).image_tokens
    assert codes.shape == (2, schedule.num_tokens) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 32
    decoded = model.decode(codes, schedule)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1
    output = model(pixels)
    # The sum goes another way there, and the norms of a random decoder enlarge its rounding.
    torch.testing.assert_close(output.reconstruction.clamp(-1, 1), decoded, atol=1e-4, rtol=0)
    assert output.semantic_features.shape == (2, *schedule.final_grid, 8)


@pytest.mark.parametrize("name", SEMANTIC_ENCODERS)
def test_any_vision_tower_serves_as_semantic_encoder(name, tmp_path):
    model = tiny_vq_model(semantic_config=SEMANTIC_ENCODERS[name])
    pixels = torch.rand(2, 3, 12, 20) * 2 - 1
    features = model.encode_semantics(pixels, (3, 5))
    assert features.shape == (2, 3, 5, 16)
    # The upper left cell's features depend most on its own pixels: cells come in rows, not columns.
    changed = pixels.clone()
    changed[:, :, :4, 16:] += 1
    difference = (model.encode_semantics(changed, (3, 5)) - features).abs().sum((0, 3))
    assert divmod(int(difference.argmax()), 5) == (0, 4)
    codes = model.encode(pixels).image_tokens
    model.save_pretrained(tmp_path)
    assert torch.equal(NextFlowVQModel.from_pretrained(tmp_path).encode(pixels).image_tokens, codes)


def test_the_folder_of_a_whole_model_is_refused_with_the_way_to_its_tokenizer(tmp_path, capfd):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a nextflow model, .*\.load_vision_tokenizer\(folder\)"):
        NextFlowVQModel.from_pretrained(tmp_path)
    assert "MISSING" not in "".join(capfd.readouterr())
    loaded = load_vision_tokenizer(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.vq_model.state_dict().items())


def test_an_incomplete_checkpoint_is_refused_by_a_few_of_its_tensors(tmp_path):
    model = NextFlowVQModel(tiny_vq_config())
    state = model.state_dict()
    model.save_pretrained(tmp_path, state_dict={name: state[name] for name in sorted(state)[7:]})
    first = ", ".join(sorted(state)[:5])
    with pytest.raises(ValueError, match=f"lacks {first} and 2 more tensors; is it complete"):
        NextFlowVQModel.from_pretrained(tmp_path)


def test_a_batch_gives_the_codes_of_single_images():
    model = tiny_vq_model()
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    alone = [model.encode(image[None]).image_tokens for image in pixels]
    assert torch.equal(model.encode(pixels).image_tokens, torch.cat(alone))


def test_preview_of_all_scales_is_the_image_and_of_some_their_sum():
    model = tiny_vq_model()
    schedule = model.config.scale_schedules.build()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = model.encode(pixels).image_tokens
    for count in range(1, schedule.num_scales + 1):
        preview = model.decode(codes[:, : schedule.offsets[count]], schedule)
        # What scale dropout trains on.
        truncated = model(pixels, num_scales=torch.full((2,), count)).reconstruction.clamp(-1, 1)
        torch.testing.assert_close(preview, truncated)
    torch.testing.assert_close(preview, model(pixels).reconstruction.clamp(-1, 1))
    mixed = model(pixels, num_scales=torch.tensor([1, 4])).reconstruction.clamp(-1, 1)
    torch.testing.assert_close(mixed[1], preview[1])
    torch.testing.assert_close(mixed[0], model.decode(codes[:, :1], schedule)[0])


def test_without_quantisation_all_scales_together_lose_nothing_that_the_last_one_holds():
    model = tiny_vq_model()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    plain = model(pixels, quantize=False).reconstruction
    torch.testing.assert_close(model(pixels, torch.tensor([4, 4]), quantize=False).reconstruction, plain)
    first = model(pixels, torch.tensor([1, 4]), quantize=False).reconstruction
    assert not torch.allclose(first[0], plain[0])


def test_training_reaches_every_part():
    model = tiny_vq_model().train()
    output = model(torch.rand(2, 3, 16, 16) * 2 - 1)
    loss = output.reconstruction.square().mean() + output.semantic_features.square().mean()
    (loss + output.codebook_loss + output.commitment_loss).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # The vision tower's pooled answer alone is not used.
    assert all(name.startswith("semantic_encoder.head.") for name in without)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (torch.zeros(1, 3, 16, 18), "is not a multiple of 4; the nearest that is: 16x16"),
        (torch.zeros(1, 3, 8, 72), "outside 1:4 to 4:1"),
        (torch.zeros(1, 1, 16, 16), r"must be \(batch, 3, height, width\), got \(1, 1, 16, 16\)"),
        (torch.full((1, 3, 16, 16), torch.nan), "NaN or infinite"),
    ],
)
def test_pixels_that_cannot_be_encoded_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        tiny_vq_model().encode(pixels)


@pytest.mark.parametrize("codes, message", [([[32]], "run from 0 to 31"), ([[1, 2]], "2 codes do not fill whole")])
def test_codes_that_cannot_be_decoded_are_refused(codes, message):
    model = tiny_vq_model()
    with pytest.raises(ValueError, match=message):
        model.decode(torch.tensor(codes), model.config.scale_schedules.build())


def test_codebook_statistics_count_codes_and_perplexity_by_scale():
    schedule = tiny_vq_config().scale_schedules.build()
    codes = torch.zeros(2, 30, dtype=torch.long)
    codes[:, 1:5] = torch.arange(4)
    statistics = codebook_statistics(codes, schedule, codebook_size=8)
    assert statistics["usage"] == 4 / 8
    assert statistics["perplexity_scale_1"] == pytest.approx(1) and statistics["perplexity_scale_2"] == pytest.approx(4)
    assert statistics["usage_scale_2"] == 4 / 8 and statistics["usage_scale_4"] == 1 / 8


def test_every_pixel_branch_has_a_name_in_the_configuration():
    assert tuple(PIXEL_BRANCHES) == CHOICES["pixel_encoder_type"] == CHOICES["pixel_decoder_type"][:-1]


def test_a_decoder_of_another_kind_than_the_encoder_decodes_the_same_codes(tmp_path):
    levels = {"pixel_channel_multipliers": (1, 2, 2), "pixel_latent_dim": 16}
    plain, both = tiny_vq_model(), tiny_vq_model(pixel_decoder_type="convolutional", **levels)
    both.load_state_dict(
        {name: weight for name, weight in plain.state_dict().items() if not name.startswith("pixel_decoder.")},
        strict=False,
    )
    assert tokenizer_fingerprint(both) == tokenizer_fingerprint(plain)
    assert isinstance(both.pixel_encoder, PatchEncoder) and isinstance(both.pixel_decoder, ConvolutionalDecoder)
    both.save_pretrained(tmp_path)
    loaded = NextFlowVQModel.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = both.encode(images).image_tokens
    assert codes.equal(plain.encode(images).image_tokens)
    assert both.decode(codes, both.schedule_of(images)).equal(loaded.decode(codes, both.schedule_of(images)))


@pytest.mark.parametrize("kind", ["pixel_encoder_type", "pixel_decoder_type"])
def test_only_convolutions_need_channels_for_every_level(kind):
    with pytest.raises(ValueError, match="downsample an image by 16, but patch_size is 4"):
        tiny_vq_config(**{kind: "convolutional"})
