"""The diffusion decoder: its condition, its bases, their equalities, saving and loading, errors."""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    PNDMScheduler,
    UNet1DModel,
)
from tiny import tiny_model
from tiny_diffusion import KINDS, TRAINED_BASES, config_of, save_pipeline_folder, tiny_decoder, tiny_vae

from transformers_nextflow.diffusion_decoder import (
    DiffusionSettings,
    NextFlowDiffusionDecoder,
    PromptEmbeddings,
    code_condition,
    condition_fingerprint,
    decode_codes,
    decoder_on_base,
)
from transformers_nextflow.diffusion_decoder.denoising import diffusion_loss
from transformers_nextflow.diffusion_decoder.schedulers import make_scheduler, predictions


TWO_STEPS = DiffusionSettings(2, 1.0)


@pytest.fixture(scope="module")
def vq_model():
    return tiny_model().vq_model


def codes_of(vq_model, size=(16, 16), count=1, seed=0):
    """Random codes (count, N) and their schedule."""
    schedule = vq_model.config.scale_schedules.for_size(*size)
    codes = torch.randint(32, (count, schedule.num_tokens), generator=torch.Generator().manual_seed(seed))
    return codes, schedule


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def inputs_of(decoder, vq_model, count=2):
    codes, schedule = codes_of(vq_model, count=count)
    sample = torch.randn(count, *decoder.sample_shape(schedule.final_grid), generator=seeds(3)[0])
    return sample, torch.full((count,), 0.5), code_condition(vq_model, codes, schedule)


def randomized(decoder):
    """With weights of the condition's input that are not zero, as after training."""
    layer = decoder.denoiser.get_submodule(decoder.kind.input_layer).condition
    with torch.no_grad():
        layer.weight.normal_(generator=seeds(7)[0])
    return decoder


# --- the condition ---


def test_the_condition_is_both_code_vectors_and_the_semantic_features(vq_model):
    codes, schedule = codes_of(vq_model)
    condition = code_condition(vq_model, codes, schedule)
    vectors = vq_model.quantizer.decode(codes, schedule)
    assert condition.shape == (1, 4 + 4 + 8, 4, 4)
    assert torch.equal(condition[:, :8], vectors)
    assert torch.equal(condition[:, 8:], vq_model.decode_semantics(vectors).permute(0, 3, 1, 2))


def test_the_fingerprint_tells_semantic_decoders_apart_and_no_precisions():
    model = tiny_model().vq_model
    before = condition_fingerprint(model)
    assert condition_fingerprint(tiny_model().vq_model.to(torch.bfloat16)) == before
    with torch.no_grad():
        model.pixel_decoder.get_parameter(next(iter(dict(model.pixel_decoder.named_parameters())))).add_(1)
    assert condition_fingerprint(model) == before
    with torch.no_grad():
        model.semantic_decoder.norm.bias.add_(1)
    assert condition_fingerprint(model) != before


# --- the bases ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_half_precision_gets_the_time_of_its_noise(kind, vq_model):
    decoder, seen = tiny_decoder(vq_model, kind).to(torch.bfloat16), []
    decoder.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"] if "timestep" in kwargs else args[1]),
        with_kwargs=True,
    )
    sample, _, condition = inputs_of(decoder, vq_model)
    with torch.no_grad():
        found = decoder(sample, torch.full((2,), 0.9), condition)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert float(seen[0][0]) in (pytest.approx(0.9), pytest.approx(900.0))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_the_unconditional_case_and_the_condition_counts(kind, vq_model):
    decoder = randomized(tiny_decoder(vq_model, kind))
    sample, time, condition = inputs_of(decoder, vq_model)
    with torch.no_grad():
        nothing = decoder(sample, time)
        assert nothing.shape == sample.shape
        assert torch.equal(decoder(sample, time, torch.zeros_like(condition)), nothing)
        assert not torch.allclose(decoder(sample, time, condition), nothing)


@pytest.mark.parametrize("kind", TRAINED_BASES)
def test_a_trained_base_begins_as_it_is(kind, vq_model):
    decoder = tiny_decoder(vq_model, kind)
    sample, time, condition = inputs_of(decoder, vq_model)
    own = decoder.denoiser.get_submodule(decoder.kind.input_layer).own
    with torch.no_grad():
        widened = decoder(sample, time, condition)
        owner, _, name = decoder.kind.input_layer.rpartition(".")
        setattr(decoder.denoiser.get_submodule(owner), name, own)
        prompt = PromptEmbeddings.nothing(decoder.denoiser, sample)
        torch.testing.assert_close(widened, decoder.kind.call(decoder.denoiser, sample, time, prompt))


@pytest.mark.parametrize("kind", TRAINED_BASES)
def test_the_prompt_goes_through_the_text_branch(kind, vq_model):
    decoder = tiny_decoder(vq_model, kind)
    sample, time, condition = inputs_of(decoder, vq_model)
    nothing = PromptEmbeddings.nothing(decoder.denoiser, sample)
    said = PromptEmbeddings(torch.randn(2, 3, 12), None if nothing.pooled is None else torch.randn(2, 6))
    with torch.no_grad():
        assert torch.equal(decoder(sample, time, condition, nothing), decoder(sample, time, condition))
        assert not torch.allclose(decoder(sample, time, condition, said), decoder(sample, time, condition))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_trained_has_gradients(kind, vq_model):
    decoder = tiny_decoder(vq_model, kind).train()
    sample, _, condition = inputs_of(decoder, vq_model)
    # The first step moves the condition's input off zero, the second reaches the projection.
    optimizer = torch.optim.SGD([p for p in decoder.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        diffusion_loss(decoder, sample, condition).backward()
        optimizer.step()
    learning = {n for n, p in decoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert learning <= trained and any("projection" in name for name in learning)
    if decoder.config.lora_rank is not None:
        assert trained == {n for n in dict(decoder.named_parameters()) if "lora_" in n or _is_of_condition(n)}
        assert any("lora_B" in name for name in learning)
    else:
        assert trained == {n for n, _ in decoder.named_parameters() if not n.startswith("autoencoder.")}


def _is_of_condition(name):
    return name.startswith("projection.") or ".condition." in name


# --- decoding ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("upsampling", [1, 2])
def test_an_image_is_the_same_in_a_batch_of_mixed_sizes(kind, upsampling, vq_model):
    decoder = randomized(tiny_decoder(vq_model, kind, upsampling=upsampling))
    square, wide = codes_of(vq_model, count=2), codes_of(vq_model, (8, 32), seed=1)
    tokens = torch.full((3, 64), -1)
    for row, codes in enumerate([*square[0], *wide[0]]):
        tokens[row, : len(codes)] = codes
    schedules = [square[1], square[1], wide[1]]
    together = decode_codes(decoder, vq_model, tokens, schedules, TWO_STEPS, seeds(0, 1, 2))
    assert [tuple(image.shape[1:]) for image in together] == [
        (upsampling * h, upsampling * w) for h, w in [(16, 16), (16, 16), (8, 32)]
    ]
    for row, image in enumerate(together):
        single = decode_codes(decoder, vq_model, tokens[[row]], [schedules[row]], TWO_STEPS, seeds(row))
        torch.testing.assert_close(single[0], image, atol=1e-4, rtol=0)


def test_one_generator_gives_the_images_their_noise_in_order(vq_model):
    decoder, (codes, schedule) = randomized(tiny_decoder(vq_model)), codes_of(vq_model, count=2)
    both = decode_codes(decoder, vq_model, codes, [schedule] * 2, TWO_STEPS, seeds(0)[0])
    [generator] = seeds(0)
    for row in range(2):
        [image] = decode_codes(decoder, vq_model, codes[[row]], [schedule], TWO_STEPS, generator)
        torch.testing.assert_close(image, both[row], atol=1e-4, rtol=0)


def test_guidance_leads_away_from_the_unconditional_prediction(vq_model):
    decoder, (codes, schedule) = randomized(tiny_decoder(vq_model, "sd3")), codes_of(vq_model)
    [noise] = [torch.randn(1, *decoder.sample_shape(schedule.final_grid), generator=seeds(0)[0])]
    condition, time = code_condition(vq_model, codes, schedule), torch.ones(1)
    with torch.no_grad():
        nothing, whole = decoder(noise, time), decoder(noise, time, condition)
        expected = decoder.decode_pixels(noise - (nothing + 3 * (whole - nothing)))
    [image] = decode_codes(decoder, vq_model, codes, [schedule], DiffusionSettings(1, 3.0), seeds(0))
    torch.testing.assert_close(image, expected[0], atol=1e-4, rtol=0)


def knowing(decoder, clean):
    """The `forward` of a decoder that knows what is below the noise, by the formulas of its kind."""
    alphas = getattr(make_scheduler(decoder.config.scheduler), "alphas_cumprod", None)

    def forward(noisy, time, *_):
        at = time.view(-1, 1, 1, 1)
        if decoder.config.predicts == "image":
            return clean
        if alphas is None:
            return (noisy - clean) / at
        alpha = alphas[(at * 1000).round().long()]
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return noise if decoder.config.predicts == "noise" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

    return forward


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_that_knows_the_image_has_no_loss_and_gives_it_in_any_number_of_steps(kind, vq_model, monkeypatch):
    decoder, (codes, schedule) = tiny_decoder(vq_model, kind), codes_of(vq_model)
    clean = torch.rand(1, *decoder.sample_shape(schedule.final_grid)) * 2 - 1
    monkeypatch.setattr(decoder, "forward", knowing(decoder, clean))
    with torch.no_grad():
        for _ in range(8):
            assert diffusion_loss(decoder, clean, code_condition(vq_model, codes, schedule)) < 1e-6
    for steps in (1, 4):
        [image] = decode_codes(decoder, vq_model, codes, [schedule], DiffusionSettings(steps, 1.0))
        torch.testing.assert_close(image, decoder.decode_pixels(clean)[0], atol=1e-4, rtol=0)


SCHEDULERS = {
    DDPMScheduler: {"clip_sample": False}, EulerDiscreteScheduler: {}, DPMSolverMultistepScheduler: {},
    PNDMScheduler: {"prediction_type": "v_prediction", "set_alpha_to_one": True},
    FlowMatchEulerDiscreteScheduler: {"stochastic_sampling": True}, FlowMatchHeunDiscreteScheduler: {},
    FlowMatchLCMScheduler: {},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_trains_and_decodes_the_same_noise_and_a_seed_fixes_the_image(kind, vq_model, monkeypatch):
    noise = config_of(make_scheduler(config_of(kind(**SCHEDULERS[kind]))))
    settings = {"scheduler": noise, "predicts": predictions(noise)[0], "lora_rank": None}
    decoder, (codes, schedule) = tiny_decoder(vq_model, "text unet", **settings), codes_of(vq_model)
    randomized(decoder)
    images = [decode_codes(decoder, vq_model, codes, [schedule], TWO_STEPS, seeds(0))[0] for _ in range(2)]
    assert torch.equal(*images)
    clean = torch.randn(1, *decoder.sample_shape(schedule.final_grid), generator=seeds(1)[0])
    monkeypatch.setattr(decoder, "forward", knowing(decoder, clean))
    assert diffusion_loss(decoder, clean, code_condition(vq_model, codes, schedule)) < 1e-6
    [image] = decode_codes(decoder, vq_model, codes, [schedule], DiffusionSettings(4, 1.0))
    torch.testing.assert_close(image, decoder.decode_pixels(clean)[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("EDMEulerScheduler", {}, "EDMEulerScheduler is not supported; use a scheduler of flow matching, or"),
        ("DDIMScheduler", {"prediction_type": "sample"}, "prediction_type 'sample' is not supported; use epsilon"),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}, "predicts='noise' does not go with this scheduler"),
    ],
)
def test_schedulers_of_another_noise_or_prediction_are_refused(kind, settings, message, vq_model):
    with pytest.raises(ValueError, match=message):
        tiny_decoder(vq_model, "text unet", scheduler={"_class_name": kind} | settings)


def test_twice_as_large_begins_with_each_condition_spread_over_four_cells(vq_model):
    decoder = tiny_decoder(vq_model)
    larger = decoder.upsampled()
    assert larger.config.upsampling == 2 and decoder.config.upsampling == 1
    vector = torch.randn(1, 16)
    small, large = decoder.projection(vector).view(16, 2, 2), larger.projection(vector).view(16, 4, 4)
    assert torch.equal(large, small.repeat_interleave(2, 1).repeat_interleave(2, 2))
    with pytest.raises(ValueError, match="already gives images twice as large"):
        larger.upsampled()


# --- saving and loading ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_decoder_gives_the_same_image(kind, vq_model, tmp_path):
    decoder, (codes, schedule) = randomized(tiny_decoder(vq_model, kind)), codes_of(vq_model)
    decoder.save_pretrained(tmp_path)
    loaded = NextFlowDiffusionDecoder.from_pretrained(tmp_path)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in decoder.named_parameters() if p.requires_grad
    }
    images = [decode_codes(d, vq_model, codes, [schedule], TWO_STEPS, seeds(0))[0] for d in (decoder, loaded)]
    torch.testing.assert_close(*images, atol=1e-5, rtol=0)


def test_weights_that_are_missing_are_an_error(vq_model, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_decoder(vq_model).save_pretrained(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    del weights["projection.0.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="projection.0.weight"):
        NextFlowDiffusionDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", TRAINED_BASES)
def test_a_base_is_loaded_from_the_folder_of_its_pipeline(kind, vq_model, tmp_path):
    folder = save_pipeline_folder(tmp_path, kind)
    decoder = decoder_on_base(vq_model, folder)
    assert decoder.config.predicts == ("noise" if kind == "text unet" else "velocity")
    name = "unet" if kind == "text unet" else "transformer"
    base = type(decoder.denoiser).from_pretrained(folder, subfolder=name)
    own = decoder.denoiser.get_submodule(decoder.kind.input_layer).own.weight
    assert torch.equal(own, base.get_submodule(decoder.kind.input_layer).weight)
    vae = type(decoder.autoencoder).from_pretrained(folder, subfolder="vae")
    assert torch.equal(decoder.autoencoder.decoder.conv_in.weight, vae.decoder.conv_in.weight)


def test_bases_without_layers_of_a_kind_and_with_a_list_of_layers_are_made(vq_model):
    flux, sd3 = (tiny_decoder(vq_model, kind).config for kind in ("flux", "sd3"))
    changes = {"num_single_layers": 0}, {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    for config, change in zip((flux, sd3), changes):
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        made = NextFlowDiffusionDecoder(**settings | {"base": settings["base"] | change})
        assert {name: made.denoiser.config[name] for name in change} == change


# --- errors ---


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"upsampling": 3}, "upsampling must be one of"),
        ({"predicts": "noise"}, "does not go with flow matching; use velocity or image"),
        ({"pixel_cell": 3}, "which does not divide it"),
        ({"lora_rank": 2}, "UNet2DModel does not support LoRA"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, vq_model):
    with pytest.raises(ValueError, match=message):
        tiny_decoder(vq_model, **settings)


def test_a_base_without_a_known_visual_branch_is_refused():
    base = {"_class_name": UNet1DModel.__name__}
    with pytest.raises(ValueError, match="UNet1DModel is not supported as the base of a diffusion decoder"):
        NextFlowDiffusionDecoder(base, condition_channels=4, patch_size=4)


def test_another_tokenizer_and_sizes_without_training_are_refused(vq_model):
    decoder, (codes, schedule) = tiny_decoder(vq_model, trained_sizes=[[8, 32]]), codes_of(vq_model)
    with pytest.raises(ValueError, match="trained on images of 8x32 pixels .* got 16x16"):
        decode_codes(decoder, vq_model, codes, [schedule], TWO_STEPS)
    decoder.check_condition(condition_fingerprint(vq_model))
    with pytest.raises(ValueError, match="trained on the codes of the tokenizer"):
        decoder.check_condition(condition_fingerprint(tiny_model(seed=1).vq_model))


@pytest.mark.parametrize("steps, scale", [(0, 1.0), (-1, 1.0), (2.5, 1.0), (True, 1.0), (2, float("nan")), (2, "2")])
def test_steps_and_guidance_out_of_range_are_refused(steps, scale):
    with pytest.raises(ValueError, match="decoder_(steps|guidance_scale) must be"):
        DiffusionSettings(steps, scale)


def test_config_of_a_part_makes_its_like():
    again = type(tiny_vae()).from_config(config_of(tiny_vae()))
    assert config_of(again) == config_of(tiny_vae())
