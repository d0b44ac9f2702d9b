"""What diffusers asks of every pipeline, asked of ours; `test_library_contracts.py` says where each check stands."""

import copy
import inspect

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from test_pipeline import PROMPTS, draw, quiet, seeded
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowPipeline


@pytest.fixture(scope="module")
def pipe():
    return quiet(NextFlowPipeline(tiny_model(), tiny_processor()))


def test_it_takes_the_arguments_by_which_pipelines_are_called():
    parameters = inspect.signature(NextFlowPipeline.__call__).parameters
    common = {"prompt", "image", "mask_image", "negative_prompt", "height", "width", "guidance_scale"}
    optional = {"num_images_per_prompt", "generator", "output_type", "return_dict", "callback_on_step_end"}
    assert common | optional | {"callback_on_step_end_tensor_inputs"} <= parameters.keys()
    assert all(parameters[name].default is not inspect.Parameter.empty for name in optional)


# Components -----------------------------------------------------------------------------------------------------------


def test_its_components_make_another_pipeline_that_draws_the_same(pipe):
    assert pipe.components.keys() == {"model", "processor", "diffusion_decoder"}
    assert pipe._optional_components == ["diffusion_decoder"] and pipe.diffusion_decoder is None
    expected = draw(pipe)
    for other in (NextFlowPipeline(**pipe.components), NextFlowPipeline.from_pipe(pipe)):
        assert other.model is pipe.model
        assert torch.equal(draw(quiet(other)), expected)
    assert torch.equal(draw(copy.deepcopy(pipe)), expected)


def test_it_moves_with_its_model_between_types_and_devices(pipe):
    other = copy.deepcopy(pipe)
    for dtype in (torch.bfloat16, torch.float16):
        other.to(dtype=dtype)
        assert other.dtype == dtype == other.model.lm_head.weight.dtype
        assert other.model.vq_model.quantizer.pixel_codebook.weight.dtype == torch.float32
        assert draw(other).isfinite().all()
    assert other.to("cpu", torch.float32).device == torch.device("cpu")
    with pytest.raises(ValueError, match="^The weights cannot be torch.int8; use"):
        other.to("cpu", torch.int8)
    with pytest.raises(ValueError, match="'meta' cannot be used"):  # numbers would be lost
        other.to("meta")
    assert draw(other).isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ({"model": torch.bfloat16}, torch.bfloat16),
        ({"default": torch.bfloat16}, torch.bfloat16),
        ({"model": torch.float16, "default": torch.bfloat16}, torch.float16),
        ({"processor": torch.bfloat16}, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_a_type_can_be_given_for_each_component(pipe, dtype, expected, argument, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert NextFlowPipeline.from_pretrained(tmp_path, **{argument: dtype}).dtype == expected


def test_a_type_for_a_component_that_is_not_there_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="A dict of dtype names model, processor, diffusion_decoder or default, got 'unet'"
    ):
        NextFlowPipeline.from_pretrained(tmp_path, torch_dtype={"unet": torch.bfloat16})


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "50KB"}], ids=str)
def test_weights_are_saved_and_found_under_another_name_and_in_shards(pipe, options, tmp_path):
    pipe.save_pretrained(tmp_path, **options)
    names = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    assert names == {"model.fp16.safetensors"} if "variant" in options else len(names) > 1
    options.pop("max_shard_size", None)
    assert torch.equal(draw(quiet(NextFlowPipeline.from_pretrained(tmp_path, **options))), draw(pipe))
    if "variant" in options:
        with pytest.raises(OSError, match="model.safetensors"):
            NextFlowPipeline.from_pretrained(tmp_path)


def test_a_folder_that_lost_its_weights_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        NextFlowPipeline.from_pretrained(tmp_path)


# Inputs and outputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_of_any_size_holds_what_its_generators_say(pipe, count):
    prompts = (PROMPTS * 2)[:count]
    batch = draw(pipe, prompts, generator=[seeded(n) for n in range(count)])
    assert batch.shape == (count, 3, 16, 16)
    again = draw(pipe, prompts[::-1], generator=[seeded(n) for n in reversed(range(count))])
    torch.testing.assert_close(again.flip(0), batch, atol=1e-4, rtol=0)


def test_images_as_inputs_may_be_of_any_kind(pipe):
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array.transpose(2, 0, 1) / 255)
    expected = draw(pipe, image=Image.fromarray(array))
    for image in (array, array / 255, array[None], tensor, tensor[None]):
        assert torch.equal(draw(pipe, image=image), expected)


@pytest.mark.parametrize("names", [[], ["image_tokens"], ["preview"], ["image_tokens", "preview"]], ids=str)
def test_the_callback_is_given_what_it_asks_for_and_nothing_else(pipe, names):
    assert set(names) <= set(pipe._callback_tensor_inputs)
    seen, expected = [], draw(pipe)
    options = {"callback_on_step_end": lambda *given: seen.append(given), "callback_on_step_end_tensor_inputs": names}
    assert torch.equal(draw(pipe, **options), expected)
    assert [(step, scale) for _, step, scale, _ in seen] == [(n, n) for n in range(4)]
    for *_, tensors in seen:
        assert list(tensors) == names and all(torch.is_tensor(tensor) for tensor in tensors.values())


@pytest.mark.parametrize("image", [None, Image.new("RGB", (16, 16), "red")], ids=["drawn", "given"])
@pytest.mark.parametrize("prompt", ["one", [["one", "two", "three"]]], ids=["written", "scripted"])
def test_videos_and_chats_end_after_the_scale_at_which_they_are_asked_to(prompt, image):
    pipe, scales = quiet(NextFlowPipeline(tiny_model(), tiny_processor())), []

    def counted(*_):
        scales.append(len(scales))
        pipe._interrupt = len(scales) == 6

    handle = pipe.model.visual_head.register_forward_hook(counted)
    images = None if image is None else image if isinstance(prompt, str) else [image]
    frames = 3 if isinstance(prompt, str) else None
    video = pipe.video(prompt, images, frames, max_transition_tokens=1)
    assert len(scales) == 6 and len(video.transitions[0]) == len(video.frames[0]) - 1
    assert len(video.frames[0]) == (2 if image is None else 3)  # of 4 scales each
    scales[:] = range(4)
    answer = pipe.chat([{"role": "user", "content": "one"}], 1, min_images=1, callback=lambda *_: None)
    assert len(scales) == 6 and "image" in [part["type"] for part in answer["content"]]
    handle.remove()


def test_an_interrupted_call_leaves_the_next_one_whole(pipe):
    expected = draw(pipe)

    def stop(pipeline, step, scale, tensors):
        pipeline._interrupt = True

    assert pipe(PROMPTS[0], generator=seeded(), callback_on_step_end=stop).image_tokens.shape == (1, 1)
    assert torch.equal(draw(pipe), expected)


def test_guidance_of_one_reads_no_second_row(pipe):
    rows = []
    handle = pipe.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    for guidance, expected in ((1.0, 1), (2.0, 2)):
        rows.clear()
        draw(pipe, guidance_scale=guidance)
        assert rows == [expected] * 4
    handle.remove()


def test_the_class_is_found_by_the_name_that_the_folder_holds(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = DiffusionPipeline.load_config(tmp_path)
    assert index["_class_name"] == ["pipeline", "NextFlowPipeline"]
    assert index["model"] == ["transformers_nextflow.modeling_nextflow", "NextFlowForConditionalGeneration"]
    assert index["processor"] == ["transformers_nextflow.processing_nextflow", "NextFlowProcessor"]
