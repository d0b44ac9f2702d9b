"""The pipeline: what it takes and gives, its equalities, saving and loading, errors."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny import tiny_model, tiny_processor

import transformers_nextflow
from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.adapters import lora_config


ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle", "two blue squares and a green star"]
NUM_SCALES = 4


@pytest.fixture(scope="module")
def pipe():
    return quiet(NextFlowPipeline(tiny_model(), tiny_processor()))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, prompt=PROMPTS[0], seed=0, **kwargs):
    """Pixels (B, 3, H, W)."""
    options = {"guidance_scale": 2.0, "generator": seeded(seed), "output_type": "pt"}
    return pipe(prompt, **(options | kwargs)).images


# --- what it takes and gives ---


def test_a_prompt_gives_one_image_and_a_list_one_for_each(pipe):
    assert draw(pipe).shape == (1, 3, 16, 16)
    assert draw(pipe, PROMPTS).shape == (2, 3, 16, 16)
    assert torch.equal(draw(pipe, [PROMPTS[0]]), draw(pipe, PROMPTS[0]))


def test_prompt_seed_and_guidance_each_change_the_image(pipe):
    image = draw(pipe)
    assert torch.equal(image, draw(pipe))
    for other in (draw(pipe, PROMPTS[1]), draw(pipe, seed=1), draw(pipe, guidance_scale=1.0)):
        assert not torch.equal(image, other)


def test_the_output_types_hold_the_same_image(pipe):
    tensor, array = draw(pipe, output_type="pt"), draw(pipe, output_type="np")
    [image] = draw(pipe, output_type="pil")
    assert isinstance(image, Image.Image)
    assert 0 <= tensor.min() and tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(image), (array[0] * 255).round().astype(np.uint8))


def test_a_tuple_holds_what_the_output_holds(pipe):
    output = pipe(PROMPTS[0], generator=seeded(), output_type="np")
    images, image_tokens = pipe(PROMPTS[0], generator=seeded(), output_type="np", return_dict=False)
    np.testing.assert_array_equal(output.images, images)
    assert torch.equal(output.image_tokens, image_tokens)
    assert image_tokens.shape == (1, 1 + 4 + 9 + 16)


def test_height_and_width_choose_the_aspect_ratio(pipe):
    assert draw(pipe, height=8, width=32).shape == (1, 3, 8, 32)


def test_the_default_size_is_the_square_of_the_largest_level():
    levels = [[8, 2], [16, 4]]
    pipe = quiet(NextFlowPipeline(tiny_model(vq_config={"levels": levels}), tiny_processor(levels=levels)))
    assert draw(pipe).shape == (1, 3, 16, 16)
    assert draw(pipe, height=8, width=8).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_image_depends_on_its_own_generator_and_not_on_its_batch(pipe, guidance_scale):
    options = {"guidance_scale": guidance_scale}
    batch = draw(pipe, PROMPTS, generator=[seeded(0), seeded(1)], **options)
    for seed, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(batch[seed : seed + 1], draw(pipe, prompt, seed, **options), atol=1e-4, rtol=0)


def test_the_images_of_a_prompt_follow_each_other(pipe):
    generators = [seeded(i) for i in range(4)]
    batch = draw(pipe, PROMPTS, generator=generators, num_images_per_prompt=2)
    single = [draw(pipe, PROMPTS[i // 2], seed=i) for i in range(4)]
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-4, rtol=0)


def test_a_negative_prompt_changes_the_image_and_goes_for_all_prompts(pipe):
    assert torch.equal(draw(pipe, PROMPTS), draw(pipe, PROMPTS, negative_prompt=""))
    one_for_all = draw(pipe, PROMPTS, negative_prompt="one")
    assert torch.equal(one_for_all, draw(pipe, PROMPTS, negative_prompt=["one", "one"]))
    assert not torch.equal(one_for_all, draw(pipe, PROMPTS))


def test_settings_that_are_not_given_are_the_checkpoints():
    pipe = quiet(NextFlowPipeline(tiny_model(), tiny_processor()))
    explicit = draw(pipe, guidance_scale=3.0, top_k=2, temperature=0.5, top_p=0.9, num_unguided_scales=1)
    pipe.model.generation_config.image_sampling = {
        "guidance_scale": 3.0, "top_k": 2, "temperature": 0.5, "top_p": 0.9, "num_unguided_scales": 1,
    }  # fmt: skip
    assert torch.equal(explicit, draw(pipe, guidance_scale=None))
    assert not torch.equal(explicit, draw(pipe, guidance_scale=None, top_k=32))


def test_edits_have_settings_of_their_own():
    pipe = quiet(NextFlowPipeline(tiny_model(), tiny_processor()))
    first = Image.new("RGB", (16, 16), "red")
    drawn, edited = draw(pipe), draw(pipe, image=first, temperature=0.0, guidance_scale=3.0)
    varied = draw(pipe, image=first, num_kept_scales=1)
    pipe.model.generation_config.editing_sampling = {"temperature": 0.0, "guidance_scale": 3.0}
    assert torch.equal(draw(pipe, image=first, guidance_scale=None), edited)
    # What is drawn from text alone is no edit.
    assert torch.equal(draw(pipe), drawn) and torch.equal(draw(pipe, image=first, num_kept_scales=1), varied)


# --- callbacks ---


def test_the_callback_sees_each_scale_and_the_last_preview_is_the_image(pipe):
    seen = []

    def watch(pipeline, step, scale, callback_kwargs):
        assert pipeline is pipe and step == scale
        seen.append((scale, callback_kwargs))

    names = ["image_tokens", "preview"]
    image = draw(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert [scale for scale, _ in seen] == list(range(NUM_SCALES))
    assert [kwargs["image_tokens"].shape[1] for _, kwargs in seen] == [1, 5, 14, 30]
    assert torch.equal(seen[-1][1]["preview"], image)
    assert torch.equal(image, draw(pipe))


def test_a_preview_is_made_only_where_it_is_asked_for(pipe):
    seen = []
    draw(pipe, callback_on_step_end=lambda *arguments: seen.append(arguments[-1]))
    assert [list(kwargs) for kwargs in seen] == [["image_tokens"]] * NUM_SCALES


def test_an_interrupted_drawing_gives_the_preview_of_its_scales(pipe):
    previews = []

    def stop(pipeline, step, scale, callback_kwargs):
        previews.append(callback_kwargs["preview"])
        pipeline._interrupt = scale == 1

    options = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["preview"]}
    image = draw(pipe, **options)
    assert len(previews) == 2 and pipe.interrupt
    assert torch.equal(image, previews[-1])
    assert not torch.equal(image, draw(pipe)) and not pipe.interrupt


def test_the_progress_bar_counts_scales(capsys):
    NextFlowPipeline(tiny_model(), tiny_processor())(PROMPTS[0])
    assert f"{NUM_SCALES}/{NUM_SCALES}" in capsys.readouterr().err


# --- saving and loading ---


def test_a_saved_pipeline_draws_the_same_image(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(quiet(NextFlowPipeline.from_pretrained(tmp_path))), draw(pipe))


def test_a_plain_model_folder_draws_the_same_image(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    loaded = quiet(NextFlowPipeline.from_pretrained(tmp_path))
    assert torch.equal(draw(loaded), draw(pipe))
    assert set(loaded.components) == {"model", "processor", "diffusion_decoder"}
    assert loaded.diffusion_decoder is None


def test_an_adapters_folder_is_loaded_with_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    tiny_processor().save_pretrained(base)
    adapted = NextFlowPipeline.from_pretrained(base).model
    adapted = peft.get_peft_model(adapted, lora_config(adapted, 2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = quiet(NextFlowPipeline(adapted.merge_and_unload(), tiny_processor()))
    loaded = quiet(NextFlowPipeline.from_pretrained(tmp_path / "adapter"))
    torch.testing.assert_close(draw(loaded), draw(expected), atol=1e-4, rtol=0)
    assert not torch.allclose(draw(loaded), draw(quiet(NextFlowPipeline.from_pretrained(base))), atol=1e-4)


def test_a_subfolder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no subfolder of its own, got 'model'"):
        NextFlowPipeline.from_pretrained(tmp_path, subfolder="model")


def test_temperatures_near_zero_draw_as_zero_does(pipe):
    assert torch.equal(draw(pipe, temperature=1e-40), draw(pipe, temperature=0))


def test_components_that_are_given_are_not_loaded(pipe, tmp_path):
    pipe.processor.save_pretrained(tmp_path / "processor")
    loaded = quiet(NextFlowPipeline.from_pretrained(tmp_path, model=pipe.model))
    assert loaded.model is pipe.model
    assert torch.equal(draw(loaded), draw(pipe))


def test_a_folder_that_is_not_there_is_an_os_error():
    with pytest.raises(OSError):
        NextFlowPipeline.from_pretrained("checkpoints/none")


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_bfloat16_draws_and_keeps_the_codebooks_in_float32(pipe, tmp_path, argument):
    pipe.save_pretrained(tmp_path)
    loaded = quiet(NextFlowPipeline.from_pretrained(tmp_path, **{argument: torch.bfloat16}))
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.vq_model.quantizer.pixel_codebook.weight.dtype == torch.float32
    image = draw(loaded)
    assert image.dtype == torch.float32 and image.isfinite().all()


def test_diffusion_pipeline_loads_it_in_a_fresh_process_through_its_pipeline_file(pipe, tmp_path):
    folder = tmp_path / "saved"
    pipe.save_pretrained(folder)
    code = f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
options = dict(guidance_scale=2.0, generator=torch.Generator().manual_seed(0), output_type="pt")
torch.save(pipe({PROMPTS[0]!r}, **options).images, {str(tmp_path / "image.pt")!r})
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "image.pt"), draw(pipe), atol=1e-4, rtol=0)
    # Where the class is named, the file is not run.
    (folder / "pipeline.py").write_text("raise RuntimeError")
    assert torch.equal(draw(quiet(NextFlowPipeline.from_pretrained(folder))), draw(pipe))


def test_the_pipeline_file_is_there_before_the_folder_is_uploaded(pipe, tmp_path, monkeypatch):
    seen, repositories = [], []
    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", lambda self, folder, **_: seen.extend(os.listdir(folder)))
    monkeypatch.setattr(
        "transformers_nextflow.pipeline_nextflow.upload_card_if_missing",
        lambda pipe, repo_id, token: repositories.append(repo_id),
    )
    pipe.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert sorted(seen) == ["README.md", "pipeline.py"] and repositories == ["saved"]


def test_without_diffusers_the_import_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers_nextflow.pipeline_nextflow")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install transformers-nextflow\[pipelines\]"):
        transformers_nextflow.NextFlowPipeline  # noqa: B018


def test_offloading_brings_the_model_to_its_device_before_it_draws():
    pipe = quiet(NextFlowPipeline(tiny_model(), tiny_processor()))
    accelerate = pytest.importorskip("accelerate")
    devices = []

    class Hook(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            devices.append(module)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(pipe.model, Hook())
    draw(pipe)
    assert devices == [pipe.model]
    assert NextFlowPipeline.model_cpu_offload_seq == "model->diffusion_decoder"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_offloaded_pipeline_draws_and_goes_back_to_the_cpu(pipe):
    offloaded = quiet(NextFlowPipeline(tiny_model(), tiny_processor()))
    offloaded.enable_model_cpu_offload()
    torch.testing.assert_close(draw(offloaded).cpu(), draw(pipe), atol=1e-4, rtol=0)
    assert offloaded.model.device.type == "cpu"


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "Prompt 0 is empty"),
        ({"prompt": ["a", " \n"]}, "Prompt 1 is empty"),
        ({"prompt": []}, "must be a string or a list"),
        ({"prompt": None}, "must be a string"),
        ({"height": 8, "width": 72}, "outside 1:4 to 4:1"),
        ({"height": 16, "width": 18}, "not a multiple of 4; the nearest that is: 16x16"),
        ({"height": 0}, "at least 1 pixel"),
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0"),
        ({"guidance_scale": [1.0, 2.0]}, "4 scales"),
        ({"top_k": 0}, "top_k must be a whole number from 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"generator": [seeded(), seeded()]}, "2 generators came with a batch of 1"),
        ({"generator": [seeded()], "num_images_per_prompt": 2}, "1 generators came with a batch of 2"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number from 1"),
        ({"negative_prompt": ["a", "b"]}, "1 prompts came with 2 negative ones"),
        ({"negative_prompt": "a", "guidance_scale": 1.0}, "works only through guidance"),
        ({"output_type": "latents"}, "output_type must be one of .* got 'latents'"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, r"got \['latents'\]"),
        ({"callback_on_step_end_tensor_inputs": "preview"}, "is a list of .* got 'preview'"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be at least 0 .* got inf"),
        ({"guidance_scale": "2"}, "guidance_scale must be at least 0 .* got '2'"),
        ({"guidance_scale": np.ones(4)}, "guidance_scale must be at least 0"),
        ({"temperature": [1.0, None, 1.0, 1.0]}, "temperature must be at least 0 .* got None"),
        ({"num_unguided_scales": [1]}, r"num_unguided_scales must be a whole number from 0, got \[1\]"),
        ({"negative_prompt": 5}, "must be a string or a list of strings, got 5"),
        ({"generator": 0}, "must hold torch.Generators, got 0"),
        ({"generator": [0]}, "must hold torch.Generators, got 0"),
        ({"num_candidates": 2, "candidate_scorer": lambda *_: None}, "a number for each candidate, got None"),
        ({"num_candidates": 2, "candidate_scorer": lambda *_: [1.0]}, r"2 finite numbers, got \[1.0\]"),
        ({"num_candidates": 2, "candidate_scorer": lambda *_: [1.0, np.nan]}, "2 finite numbers, got"),
    ],
)
def test_bad_input_is_refused_with_its_value_and_the_remedy(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": PROMPTS[0], "guidance_scale": 2.0} | arguments))
