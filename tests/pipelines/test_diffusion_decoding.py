"""`decoder="diffusion"` of the pipeline: what it decodes, its equalities, saving and loading, errors."""

import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from PIL import Image
from test_pipeline import PROMPTS, draw, quiet, seeded
from tiny import tiny_model, tiny_processor
from tiny_diffusion import tiny_decoder
from tiny_onecat import tiny_onecat_model, tiny_onecat_processor

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.diffusion_decoder import PromptEmbeddings
from transformers_nextflow.utils.provenance import read_provenance
from transformers_nextflow.vision_tokenizer.resampling import resample


def make_pipe(kind="small", **settings):
    model = tiny_model()
    model.generation_config.eos_token_id = -1
    decoder = tiny_decoder(model.vq_model, kind, **({"upsampling": 2, "num_inference_steps": 2} | settings))
    return quiet(NextFlowPipeline(model, tiny_processor(), decoder))


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def diffused(pipe, *args, **kwargs):
    return draw(pipe, *args, **({"decoder": "diffusion"} | kwargs))


def photo(size=(16, 16), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_it_is_off_by_default_and_gives_images_twice_as_large_of_the_same_codes(pipe):
    plain = pipe(PROMPTS[0], generator=seeded())
    large = pipe(PROMPTS[0], generator=seeded(), decoder="diffusion")
    assert torch.equal(plain.image_tokens, large.image_tokens)
    assert plain.images[0].size == (16, 16) and large.images[0].size == (32, 32)
    assert torch.equal(draw(pipe), draw(quiet(NextFlowPipeline(pipe.model, pipe.processor))))


def test_seed_steps_and_guidance_each_change_the_image(pipe):
    image = diffused(pipe)
    assert torch.equal(image, diffused(pipe)) and torch.equal(image, diffused(pipe, decoder_steps=2))
    for other in (diffused(pipe, seed=1), diffused(pipe, decoder_steps=3), diffused(pipe, decoder_guidance_scale=2)):
        assert not torch.equal(image, other)


@pytest.mark.parametrize("size", [{}, {"height": 8, "width": 32}])
def test_an_image_depends_on_its_own_generator_and_not_on_its_batch(pipe, size):
    batch = diffused(pipe, PROMPTS, generator=[seeded(0), seeded(1)], **size)
    for seed, prompt in enumerate(PROMPTS):
        alone = diffused(pipe, prompt, generator=[seeded(seed)], **size)
        torch.testing.assert_close(batch[seed : seed + 1], alone, atol=1e-4, rtol=0)


def test_edits_of_mixed_sizes_are_decoded_together(pipe):
    images = [photo(), photo((32, 8))]
    generators = [seeded(0), seeded(1)]
    together = pipe(["make it red"] * 2, image=images, generator=generators, decoder="diffusion").images
    assert [image.size for image in together] == [(32, 32), (64, 16)]
    for row, image in enumerate(images):
        alone = pipe("make it red", image=image, generator=[seeded(row)], decoder="diffusion").images[0]
        np.testing.assert_allclose(np.asarray(alone, int), np.asarray(together[row], int), atol=1)


def test_the_best_candidate_is_decoded_with_its_own_noise(pipe):
    scorer = lambda *_: torch.tensor([0.0, 1.0, 0.0, 2.0])  # noqa: E731
    options = {"num_candidates": 2, "candidate_scorer": scorer, "generator": [seeded(n) for n in range(4)]}
    best = diffused(pipe, PROMPTS, **options)
    for row, seed in enumerate((1, 3)):
        alone = diffused(pipe, PROMPTS[row], generator=[seeded(seed)])
        torch.testing.assert_close(best[row : row + 1], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("upsampling", [1, 2])
def test_pixels_outside_of_a_mask_are_the_images_own(upsampling):
    pipe, image, mask = make_pipe(upsampling=upsampling), photo(), Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    options = {"image": image, "mask_image": mask}
    pasted, drawn = diffused(pipe, paste_back=True, **options), diffused(pipe, **options)
    own = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    own = resample(own, (16 * upsampling,) * 2, "bicubic").clamp(-1, 1) / 2 + 0.5
    inside = torch.zeros(16 * upsampling, 16 * upsampling, dtype=torch.bool)
    inside[4 * upsampling : 12 * upsampling, 4 * upsampling : 12 * upsampling] = True
    assert torch.equal(pasted[..., inside], drawn[..., inside])
    torch.testing.assert_close(pasted[..., ~inside], own[..., ~inside], atol=1e-5, rtol=0)


def test_previews_are_the_pixel_decoders(pipe):
    seen = []
    options = {"callback_on_step_end": lambda *a: seen.append(a[-1]["preview"])}
    image = diffused(pipe, callback_on_step_end_tensor_inputs=["preview"], **options)
    assert torch.equal(seen[-1], draw(pipe)) and image.shape[-1] == 2 * seen[-1].shape[-1]


def test_frames_of_a_video_have_one_size_and_depend_on_their_own_generator(pipe):
    scripts = [["a red circle", "it moves"], ["a star", "it goes"]]
    options = {"decoder": "diffusion", "temperature": 0.0}
    together = pipe.video(scripts, generator=[seeded(0), seeded(1)], **options).frames
    assert {frame.size for video in together for frame in video} == {(32, 32)}
    for row, script in enumerate(scripts):
        [alone] = pipe.video([script], generator=[seeded(row)], **options).frames
        for frame, other in zip(alone, together[row]):
            np.testing.assert_allclose(np.asarray(frame, int), np.asarray(other, int), atol=1)
    [going_on] = pipe.video([scripts[0]], image=photo(), generator=[seeded(0)], **options).frames
    assert {frame.size for frame in going_on} == {(32, 32)}
    assert going_on[0] == photo().resize((32, 32), Image.Resampling.BICUBIC)


def test_a_conversation_answers_with_decoded_images(pipe):
    message = {"role": "user", "content": [{"type": "text", "text": "draw a red circle."}]}
    options = {"min_images": 1, "max_new_tokens": 2, "generator": seeded()}
    answer = pipe.chat([message], decoder="diffusion", **options)
    [image] = [part["image"] for part in answer["content"] if part["type"] == "image"]
    assert image.size == (32, 32)


def test_the_prompt_reaches_a_base_that_reads_text():
    pipe, asked = make_pipe("sd3"), []

    def encoder(prompts):
        asked.append(prompts)
        return PromptEmbeddings(torch.ones(len(prompts), 2, 12), torch.ones(len(prompts), 6))

    silent = diffused(pipe, PROMPTS)
    pipe.diffusion_decoder.text_encoder = encoder
    assert not torch.equal(diffused(pipe, PROMPTS), silent)
    assert asked == [PROMPTS]


def test_its_images_pass_the_safety_checker_and_say_what_decoded_them(pipe, tmp_path, monkeypatch):
    sides = []

    def black(images, clip_input):
        sides.append(images.shape[1])
        return np.zeros_like(images), [True]

    pipe(PROMPTS[0], decoder="diffusion", generator=seeded()).images[0].save(tmp_path / "image.png")
    told = read_provenance(tmp_path / "image.png")["settings"]
    assert (told["decoder"], told["decoder_steps"], told["decoder_guidance_scale"]) == ("diffusion", 2, 1.0)
    monkeypatch.setattr(pipe, "safety_checker", black)
    [message] = [{"role": "user", "content": [{"type": "text", "text": "draw a red circle."}]}]
    seen = [pipe(PROMPTS[0], decoder="diffusion").images[0]]
    seen += pipe.video([["a star", "it moves"]], decoder="diffusion").frames[0]
    answer = pipe.chat([message], decoder="diffusion", min_images=1, max_new_tokens=2)
    seen += [part["image"] for part in answer["content"] if part["type"] == "image"]
    assert sides == [32] * 4 and all(image.getextrema() == ((0, 0),) * 3 for image in seen)


# --- saving and loading ---


def test_a_saved_pipeline_brings_its_diffusion_decoder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = quiet(NextFlowPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(diffused(loaded), diffused(pipe), atol=1e-5, rtol=0)
    # From a folder of its own it is put beside a model.
    folder = quiet(NextFlowPipeline.from_pretrained(tmp_path / "model", processor=pipe.processor,
                                                    diffusion_decoder=tmp_path / "diffusion_decoder"))  # fmt: skip
    torch.testing.assert_close(diffused(folder), diffused(pipe), atol=1e-5, rtol=0)


def test_dtypes_name_the_diffusion_decoder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    dtypes = {"diffusion_decoder": torch.bfloat16, "default": torch.float32}
    loaded = quiet(NextFlowPipeline.from_pretrained(tmp_path, dtype=dtypes))
    assert loaded.model.dtype == torch.float32 and loaded.diffusion_decoder.dtype == torch.bfloat16
    image = diffused(loaded)
    assert image.dtype == torch.float32 and image.isfinite().all()


def test_diffusion_pipeline_loads_it(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True))
    torch.testing.assert_close(diffused(loaded), diffused(pipe), atol=1e-5, rtol=0)


# --- errors ---


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decoder": "vae"}, "decoder must be one of"),
        ({"decoder": "pixel", "decoder_steps": 4}, "the pixel decoder has none"),
        ({"decoder_steps": 0}, "decoder_steps must be a whole number from 1 to 1000, got 0"),
        ({"decoder_guidance_scale": float("inf")}, "decoder_guidance_scale must be a number from 0"),
        ({"output_type": "latent"}, "which are not decoded"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_drawn(pipe, options, message, monkeypatch):
    monkeypatch.setattr(pipe.model, "generate_images", None)
    with pytest.raises(ValueError, match=message):
        diffused(pipe, **options)


def test_a_size_without_training_and_a_pipeline_without_the_decoder_are_refused():
    pipe = make_pipe(trained_sizes=[[16, 16]])
    with pytest.raises(ValueError, match="trained on images of 16x16 pixels"):
        diffused(pipe, height=8, width=32)
    with pytest.raises(ValueError, match="has no diffusion decoder"):
        diffused(NextFlowPipeline(pipe.model, pipe.processor))


def test_the_decoder_of_another_tokenizer_and_what_is_none_are_refused(pipe):
    other = tiny_decoder(tiny_model(seed=1).vq_model)
    with pytest.raises(ValueError, match="trained on the codes of the tokenizer"):
        NextFlowPipeline(pipe.model, pipe.processor, other)
    with pytest.raises(ValueError, match="must be a NextFlowDiffusionDecoder"):
        NextFlowPipeline(pipe.model, pipe.processor, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="OneCatForConditionalGeneration has a BitwiseVQModel"):
        NextFlowPipeline(tiny_onecat_model(), tiny_onecat_processor(), other)
